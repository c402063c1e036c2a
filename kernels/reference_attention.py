"""The GPU's attention kernels in plain torch, same names and signatures: append, decode, expand, prefill.

Nothing here knows models or recipes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.kernels import reference
from qrun.kernels.gpu_kv import Side, padded

GROUP = 32
E4M3_MAX = 448.0


def hadamard32(x: Tensor) -> Tensor:
    """Each run of 32 along the last dimension times Sylvester's orthonormal matrix; float32, its own inverse."""
    matrix = torch.ones(1, 1, device=x.device)
    while matrix.shape[0] < GROUP:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (_split(x.float(), GROUP) @ (matrix / GROUP**0.5)).flatten(-2)


def encode(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """float32 [..., D] to the codes and the scale of ``kind``."""
    if kind in ("bf16", "fp32"):
        return x.to(torch.bfloat16 if kind == "bf16" else torch.float32), None
    if kind == "fp8":
        inverse = E4M3_MAX / x.abs().amax(-1, keepdim=True)
        usable = inverse.isfinite()
        scale = torch.where(usable, x.abs().amax(-1, keepdim=True) / E4M3_MAX, 1.0)
        codes = (x * torch.where(usable, inverse, 1.0)).clamp(-E4M3_MAX, E4M3_MAX)
        return codes.to(torch.float8_e4m3fn), scale
    x = F.pad(x, (0, -x.shape[-1] % GROUP))
    groups = _split(hadamard32(x) if kind == "int4" else x, GROUP)
    if kind == "int8":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16()
        codes = (groups * _reciprocal(scale)).round().clamp(-127, 127).to(torch.int8).flatten(-2)
        return codes, scale.squeeze(-1)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    scale = (torch.where(-low > high, low, high) / -8).bfloat16()
    codes = (groups * _reciprocal(scale) + 8.5).floor().clamp(0, 15).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.squeeze(-1)


def decode(side: Side, start: int, stop: int, *, dim: int, rotate: bool = True) -> Tensor:
    """Positions start … stop-1 as float32 [kv_heads, stop-start, DP]; int4 stays rotated unless ``rotate``."""
    codes = side.codes[:, start:stop]
    if side.kind == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    if side.kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    values = codes.float() - (8 if side.kind == "int4" else 0)
    if side.scale is not None:
        scale = side.scale[:, start:stop].float()
        values = values * (scale if side.kind == "fp8" else scale.repeat_interleave(GROUP, -1))
    values = F.pad(values, (0, padded(dim) - values.shape[-1]))
    return hadamard32(values) if side.kind == "int4" and rotate else values


def append(
    qkv: Tensor,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k: Side,
    v: Side,
    q_out: Tensor,
) -> None:
    """qkv [M, (heads + 2·kv_heads)·dim]: K and V into the cache at ``positions``, q ready for attention into q_out."""
    q, key, value = torch.split(_split(qkv, dim), [heads, kv_heads, kv_heads], 1)
    if q_norm is not None and k_norm is not None:
        q, key = reference.rms_norm(q, q_norm, eps), reference.rms_norm(key, k_norm, eps)
    for side, x in ((k, reference.rope(key, cos, sin)), (v, value)):
        codes, scale = encode(x.transpose(0, 1), side.kind)
        side.codes[:, positions] = codes.view(side.codes.dtype)
        if side.scale is not None and scale is not None:
            side.scale[:, positions] = scale
    q = F.pad(reference.rope(q, cos, sin) / math.sqrt(dim), (0, -dim % GROUP))
    q_out.copy_(hadamard32(q) if k.kind == "int4" else q)


def decode_attention(
    q: Tensor,
    *,
    k: Side,
    v: Side,
    dim: int,
    length: Tensor,
    window: int,
    splits: int,
    partial: Tensor,
    counter: Tensor,
    out: Tensor,
    sums: Tensor | None,
) -> None:
    """One token's q [heads, DP], as ``append`` leaves it, over ``length`` positions into out [1, ≥ heads·dim].

    ``sums`` [1, ≥ heads·dim/32] gets the sums of the rounded out over each 32.
    """
    stop = int(length)
    start = max(0, stop - window) if window else 0
    keys, values = decode(k, start, stop, dim=dim, rotate=False), decode(v, start, stop, dim=dim)
    grouped = q.float().view(keys.shape[0], -1, q.shape[1])  # [kv_heads, heads per kv head, DP]
    row = (torch.softmax(grouped @ keys.mT, -1) @ values)[..., :dim].flatten()
    out[0, : row.shape[0]] = row.to(out.dtype)
    if sums is not None:
        sums[0, : row.shape[0] // GROUP] = _split(out[0, : row.shape[0]].float(), GROUP).sum(-1)


def expand_kv(side: Side, *, dim: int, start: int, stop: int, rotate: bool, out: Tensor) -> None:
    """Positions start … stop-1 into out [kv_heads, stop-start, DP]; int4 is rotated back if ``rotate``."""
    out.copy_(decode(side, start, stop, dim=dim, rotate=rotate))


def flash(
    q: Tensor, keys: Tensor, values: Tensor, *, dim: int, start: int, first: int, window: int, out: Tensor
) -> None:
    """Causal attention of q [M, heads, DP] at positions start … over keys and values [kv_heads, T, DP].

    ``first`` is the position of keys[:, 0]; a query sees the last ``window`` positions, itself included, or all if 0.
    """
    tokens = q.shape[0]
    grouped = q.float().view(tokens, keys.shape[0], -1, q.shape[2]).permute(1, 2, 0, 3)  # [kv_heads, group, M, DP]
    scores = grouped @ keys.float()[:, None].mT
    at = torch.arange(start, start + tokens, device=q.device)[:, None]
    there = torch.arange(first, first + keys.shape[1], device=q.device)[None]
    hidden = there > at
    if window:
        hidden |= there <= at - window
    mixed = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1) @ values.float()[:, None]
    rows = mixed[..., :dim].flatten(0, 1).transpose(0, 1).flatten(1)
    out[:, : rows.shape[1]] = rows.to(out.dtype)


def _split(x: Tensor, size: int) -> Tensor:
    """[..., N·size] as [..., N, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def _reciprocal(scale: Tensor) -> Tensor:
    inverse = 1 / scale.float()
    return torch.where(inverse.isfinite(), inverse, 0.0)
