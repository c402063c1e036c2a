"""What chooses, in plain torch: the router of gpu_router and the sampling of gpu_sample, same names and signatures."""

import torch
from torch import Tensor

from qrun.kernels import reference

MOST = 64
_WORD = 0xFFFFFFFF


def route(
    x: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    correction: Tensor | None,
    *,
    top_k: int,
    shared: int,
    normalise: bool,
    norm_min: float,
    logits: Tensor,
    counter: Tensor,
    gates: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose experts for x [M, H], which is normalised first, and append the shared ones; ``counter`` is not used."""
    hidden = reference.rms_norm(x, norm, eps)
    logits.copy_(hidden @ router.t())
    weights, found = reference.route(hidden, router, correction, top_k, normalise=normalise, norm_min=norm_min)
    gates[:, :top_k], gates[:, top_k:] = weights, 1.0
    chosen[:, :top_k] = found.to(torch.int32)
    chosen[:, top_k:] = router.shape[0] + torch.arange(shared, dtype=torch.int32, device=x.device)
    return gates, chosen


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011) of int64 tensors, as floats in [0, 1): what ``tl.rand`` gives."""
    a, b, c, d = offset & _WORD, (offset >> 32) & _WORD, torch.zeros_like(offset), torch.zeros_like(offset)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: the two words are right
        a, c = ((second >> 32) & _WORD) ^ b ^ low, ((first >> 32) & _WORD) ^ d ^ high
        b, d = second & _WORD, first & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    signed = torch.where(a >= 1 << 31, a - (1 << 32), a)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: Tensor,
    counter: Tensor,
    values: Tensor,
    ids: Tensor,
    token: Tensor,
    keys: Tensor | None = None,
    arrived: Tensor | None = None,
) -> Tensor:
    """Choose a token by logits [1, V] and count the draw; ``keys`` and ``arrived`` are not used."""
    row = torch.where(logits[0].isnan(), -torch.inf, logits[0])
    if temperature == 0:
        return token.copy_(row.argmax(-1, keepdim=True))
    best, order = row.sort(descending=True, stable=True)
    best, order = best[:top_k], order[:top_k]
    chances = ((best - best[0].clamp_min(-3e38)) / temperature).exp()
    chances = chances / chances.sum().clamp_min(1e-30)
    likeliest = chances[0]
    if top_p < 1:
        chances = torch.where(chances.cumsum(-1) - chances < top_p, chances, 0.0)
    if min_p > 0:
        chances = torch.where(chances >= min_p * likeliest, chances, 0.0)
    values.zero_()
    values[: len(best)] = chances
    ids.fill_(-1)
    ids[: len(best)] = order.to(torch.int32)
    luck = uniform(seed, counter * MOST + torch.arange(len(best), device=logits.device))
    race = torch.where(chances > 0, chances / -luck.clamp_min(1e-10).log(), -1.0)
    counter += 1
    return token.copy_(order[race.argmax(-1, keepdim=True)])
