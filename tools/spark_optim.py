"""The optimizer for spark: Muon for the matrices, AdamW for the embedding, the router and the norms.

Knows parameters only. Muon (momentum, orthogonalised by a Newton-Schulz iteration) needs about half of AdamW's tokens
on a model this small, for about a sixth more arithmetic. Matrices are cut into blocks of 128 rows, which is cheaper and
treats gate, up, query, key and value apart; blocks of one width are done in one batch.
"""

import torch
from spark_model import Spark, Weights
from torch import Tensor


def orthogonalise(g: Tensor) -> Tensor:
    """Approximate U V^T of each matrix in [B, N, K] by five steps of a quintic iteration."""
    x = g / (g.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-2, -1)
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon:
    """SGD with Nesterov momentum whose update is orthogonalised, for `Weights`."""

    def __init__(self, matrices: list[Tensor], *, lr: float, decay: float, momentum: float = 0.95) -> None:
        self.lr, self.decay, self.momentum = lr, decay, momentum
        widths: dict[int, list[Tensor]] = {}
        for p in matrices:
            widths.setdefault(p.shape[-1], []).append(p)
        self.groups = list(widths.values())
        self.memory = [torch.cat([_blocks(torch.zeros_like(p)) for p in group]) for group in self.groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rate."""
        for group, memory in zip(self.groups, self.memory, strict=True):
            grad = torch.cat([_blocks(_grad(p)) for p in group])
            memory.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp_(memory, self.momentum))
            for p, u in zip(group, torch.split(update, [len(_blocks(p)) for p in group]), strict=True):
                p.mul_(1 - self.lr * scale * self.decay).add_(u.reshape(p.shape), alpha=-self.lr * scale)


def _blocks(t: Tensor) -> Tensor:
    return t.view(-1, 128, t.shape[-1])


def _grad(p: Tensor) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)


class Optimizer:
    """Both optimizers behind one `step`."""

    def __init__(self, model: Spark, *, matrix_lr: float = 0.02, lr: float = 0.004) -> None:
        matrices = [m.weight for m in model.modules() if isinstance(m, Weights)]
        known = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in known]
        self.muon = Muon(list(matrices), lr=matrix_lr, decay=0.05)
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.lr = lr

    def step(self, scale: float) -> None:
        """Update all parameters with the learning rates times `scale`, and clear the gradients."""
        self.muon.step(scale)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * scale
        self.adam.step()  # pyright: ignore[reportUnknownMemberType]
        for group in self.muon.groups:
            for p in group:
                p.grad = None
        self.adam.zero_grad()
