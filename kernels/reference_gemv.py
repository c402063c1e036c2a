"""`gpu_gemv.gemv` in plain torch: the whole weight expanded, then an ordinary product and what becomes of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.kernels.gpu_gemv import Config, Emit, Epilogue, Operand, Routed, Scratch
from qrun.kernels.gpu_packed import Packed
from qrun.kernels.reference_gemm import expand


def gemv(
    w: Packed,
    x: Operand,
    out: Tensor,
    *,
    scratch: Scratch | None = None,
    config: Config | None = None,
    epilogue: Epilogue = "store",
    bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_sums: Tensor | None = None,
    emit: Emit | None = None,
    routed: Routed | None = None,
    tokens: int | None = None,
) -> None:
    """:func:`qrun.kernels.gpu_gemv.gemv`; the squares' sums all in the first of their parts."""
    del scratch, config
    rows = x.x[:, : w.k].float()
    factor = None if x.ssq is None else torch.rsqrt(x.ssq.sum(0) / x.width + eps)[:, None]
    if routed is None:
        y = _finish(rows @ dense(w).t(), factor, bias, w, epilogue)
    else:
        experts = _owners(routed)
        each = torch.stack([rows[_row(routed, s)] @ dense(w[e]).t() for s, e in experts.items()])
        picked = None if factor is None else torch.stack([factor[_row(routed, s)] for s in experts])
        each = _finish(each, picked, bias, w, epilogue)
        if routed.gates is not None:
            each = (each * routed.gates[:, None]).view(tokens or -1, routed.slots, -1).sum(1)
            y = each
        else:
            y = torch.empty_like(each)
            y[list(experts)] = each
    if epilogue == "silu":
        half = y[:, : w.n // 2].to(out.dtype)
        out[:, : half.shape[1]] = half
        if out_sums is not None:
            _sums(half, out_sums)
        return
    y = y if residual is None else residual + y
    out.copy_(y)
    if emit is not None:
        emit.x[:, : w.n] = (y * emit.norm).to(emit.x.dtype)
        _sums(emit.x[:, : w.n], emit.sums)
        emit.ssq.zero_()
        emit.ssq[0] = y.square().sum(1)


def dense(w: Packed) -> Tensor:
    """The weight's values, float32 [Np or n, k], in the order of its stored rows."""
    if w.kind == "plain":
        return w.codes[:, : w.k].float()
    out = torch.empty(w.rows, w.k, device=w.codes.device)
    expand(w, out)
    return out


def _owners(routed: Routed) -> dict[int, int]:
    """Slot -> its expert."""
    if routed.order is None:
        return dict(enumerate(int(e) for e in routed.chosen))
    owned = zip(routed.order, routed.chosen, strict=True)
    return {int(slot): int(expert) for slots, expert in owned for slot in slots if int(slot) >= 0}


def _row(routed: Routed, slot: int) -> int:
    return slot // routed.slots if routed.shared_rows else slot


def _finish(y: Tensor, factor: Tensor | None, bias: Tensor | None, w: Packed, epilogue: Epilogue) -> Tensor:
    y = y if factor is None else y * factor
    y = y if bias is None else y + bias
    if epilogue == "silu":
        both = y.view(y.shape[0], -1, 2, w.pairs)
        return (F.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1)
    return y[:, : w.n]


def _sums(x: Tensor, sums: Tensor) -> None:
    wide = F.pad(x.float(), (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32).sum(-1)
    sums[:, : wide.shape[1]] = wide
