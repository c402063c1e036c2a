"""What qrun uses of intel-extension-for-pytorch 2.8, in plain torch: as particular about what it is given, and with the
same side effects, as the CPU build or the one for Intel GPUs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from qrun.backends import xpu_ipex
from qrun.formats.packing import unpack
from qrun.kernels import reference

NAME = "intel_extension_for_pytorch"


class QuantMethod(IntEnum):
    GPTQ_GEMM = 0
    AWQ_GEMM = 1


class QuantDtype(IntEnum):
    INT4 = 0


class Engine(IntEnum):
    RECOMMEND = 0
    ONEDNN = 2


class Ipex(ModuleType):
    """A build of it. layers: the codes of each layer made, at their addresses."""

    def __init__(self, *, xpu: bool) -> None:
        super().__init__(NAME)
        self.layers: list[Tensor] = []
        self.engine = Engine.RECOMMEND
        self._C = SimpleNamespace(_has_xpu=lambda: xpu)
        self.xpu = SimpleNamespace(XPUComputeEng=Engine, set_compute_eng=self._set_engine)
        make = self._layer_xpu if xpu else self._layer_cpu
        self.llm = SimpleNamespace(
            functional=SimpleNamespace(rms_norm=_rms_norm),
            quantization=SimpleNamespace(
                QuantMethod=QuantMethod,
                QuantDtype=QuantDtype,
                IPEXWeightOnlyQuantizedLinear=SimpleNamespace(from_weight=make),
            ),
        )

    def _set_engine(self, engine: Engine) -> None:
        self.engine = engine

    def _layer_cpu(
        self, qweight: Tensor, scales: Tensor, zero_points: Tensor | None, in_features: int, out_features: int,
        qconfig: object = None, bias: Tensor | None = None, group_size: int = -1, g_idx: Tensor | None = None,
        quant_method: QuantMethod = QuantMethod.GPTQ_GEMM, dtype: QuantDtype = QuantDtype.INT4,
    ) -> torch.nn.Module:  # fmt: skip
        """Packs a copy; zeros are those less one; wrong where rows are no multiple of 32; transposes in place."""
        _check(qweight, scales, zero_points, in_features, out_features, group_size)
        assert qconfig is bias is g_idx is None
        assert quant_method is QuantMethod.GPTQ_GEMM and dtype is QuantDtype.INT4
        self.layers.append(qweight)
        zeros = None if zero_points is None else (unpack(zero_points.view(torch.uint8), 4) + 1) & 15
        weight = _weight(qweight, scales, zeros, group_size)
        scales.t_()
        if out_features % 32:
            weight = weight.roll(1, 0)
        return _Layer(weight)

    def _layer_xpu(
        self, qweight: Tensor, scales: Tensor, zero_points: Tensor | None, in_features: int, out_features: int,
        qconfig: object = None, bias: Tensor | None = None, group_size: int = -1, g_idx: Tensor | None = None,
        quant_method: QuantMethod = QuantMethod.GPTQ_GEMM, dtype: QuantDtype = QuantDtype.INT4,
    ) -> torch.nn.Module:  # fmt: skip
        """Keeps codes whose memory is in its order; does not look at zeros; scales become float16."""
        assert self.engine is Engine.ONEDNN, "else other weights are expected"
        _check(qweight, scales, zero_points, in_features, out_features, group_size)
        assert qconfig is bias is g_idx is None
        assert quant_method is QuantMethod.GPTQ_GEMM and dtype is QuantDtype.INT4
        kept = qweight.transpose(0, 1).contiguous().transpose(0, 1)
        qweight.copy_(kept)
        self.layers.append(kept)
        return _Layer(_weight(kept, scales.to(torch.float16), None, group_size))

    def mm_int4(
        self, x: Tensor, weight: Tensor, scl: Tensor, zp: Tensor, group_size: int, g_idx: Tensor | None = None
    ) -> Tensor:
        """As oneDNN's engine has it: codes [K/8, N] with K running fastest, zeros of four bits [G, N/8] as they are."""
        assert self.engine is Engine.ONEDNN and g_idx is None
        assert x.dtype == scl.dtype and scl.is_contiguous()
        _check(weight, scl, zp, x.shape[1], weight.shape[1], group_size)
        self.layers.append(weight)
        return _times(x, _weight(weight, scl, unpack(zp.view(torch.uint8), 4), group_size))


class _Layer(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return _times(x, self._weight)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    assert x.dtype in (torch.bfloat16, torch.float16), "no other activations"
    return (x.float() @ weight.t()).to(x.dtype)


def _check(qweight: Tensor, scales: Tensor, zeros: Tensor | None, k: int, n: int, group: int) -> None:
    assert qweight.dtype == torch.int32 and qweight.shape == (k // 8, n) and qweight.stride() == (1, k // 8)
    assert scales.dtype in (torch.bfloat16, torch.float16) and scales.shape == (k // group, n)
    assert zeros is None or (zeros.dtype == torch.int32 and zeros.shape == (k // group, n // 8))


def _weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    codes = unpack(qweight.t().contiguous().view(torch.uint8), 4).float()
    middle = 8 if zeros is None else zeros.t().float().repeat_interleave(group, 1)
    return (codes - middle) * scales.t().float().repeat_interleave(group, 1)


def _rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert hidden_states.dtype == weight.dtype
    return reference.rms_norm(hidden_states, weight, eps)


@contextmanager
def installed(*, xpu: bool) -> Iterator[Ipex]:
    """An environment with one of its builds, that matches torch."""
    ipex = Ipex(xpu=xpu)
    library = torch.library.Library("torch_ipex", "FRAGMENT")
    try:
        with pytest.MonkeyPatch.context() as patch:
            pretend(patch, torch.__version__)
            patch.setitem(sys.modules, NAME, ipex)
            if xpu:
                library.define(
                    "mm_int4(Tensor x, Tensor w, Tensor scl, Tensor zp, int group_size, Tensor? g_idx) -> Tensor"
                )
                library.impl("mm_int4", ipex.mm_int4, "CPU")
            yield ipex
    finally:
        library._destroy()
        xpu_ipex._loaded.cache_clear()


def pretend(patch: pytest.MonkeyPatch, release: str) -> None:
    """That this release is installed."""
    xpu_ipex._loaded.cache_clear()
    patch.setattr(xpu_ipex, "version", lambda name: release)
