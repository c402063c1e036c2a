"""FastDeploy's WINT2: its decoding against the formula written out, number by number, and files that lie.

The tensors are made here, by its published layout: no checkpoint of FastDeploy's own was at hand.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import make
from safetensors.torch import load_file, save_file
from torch import Tensor

import qrun
from qrun.errors import CheckpointError, QrunError, UnsupportedModelError
from qrun.formats import from_tensors
from qrun.formats.ccq import CcqFormat
from qrun.readers.fastdeploy import FastDeployReader
from qrun.recipe import Recipe

CONFIG: Mapping[str, Any] = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {
        "moe_w4_quant_config": {"quant_type": "wint4", "quant_start_layer": 0, "quant_end_layer": 6},
        "moe_w2_quant_config": {"quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64},
    },
}
EXPERT = "model.layers.7.mlp.experts.3."
HIDDEN, INNER = 256, 128


class Tensors(dict[str, Tensor]):
    """Tensors by name, as a checkpoint has them."""

    def names(self) -> list[str]:
        return sorted(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def read(self, name: str) -> Tensor:
        return self[name]


def stored(name: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A linear layer of n outputs and k inputs as FastDeploy writes one."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{name}.quant_weight": torch.randint(0, 256, (-(-k // 4), n), dtype=torch.uint8, generator=random),
        f"{name}.weight_scale": torch.randint(0, 256, (-(-k // 128), n), dtype=torch.uint8, generator=random),
        f"{name}.super_scales": (torch.rand(n, generator=random) * 0.01).to(dtype),
        f"{name}.code_scale": 100 + 28 * torch.rand(n, generator=random),
        f"{name}.code_zp": 60 * torch.randn(n, generator=random),
    }


def by_hand(parts: Mapping[str, Tensor], name: str, k: int) -> Tensor:
    """The weight [N, K], one number after another."""
    codes, local, scale, line, zp = (
        parts[f"{name}.{end}"].float().numpy()
        for end in ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    )
    n = codes.shape[1]
    out = np.empty((n, k), np.float32)
    for column in range(n):
        for row in range(k):
            point = np.float32(codes[row // 4, column]) * np.float32(line[column]) + np.float32(zp[column])
            code = int(np.floor(point + np.float32(0.5)))
            value = code // 2 ** (9 - 3 * (row % 4)) % 64 - 32
            both = int(local[row // 128, column])
            step = both // 16 if row // 64 % 2 == 0 else both % 16
            out[column, row] = np.float32(value) * (np.float32(step) * np.float32(scale[column]))
    return torch.from_numpy(out)


def checkpoint(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    up_gate = stored(EXPERT + "up_gate_proj", 2 * INNER, HIDDEN, dtype)
    return Tensors(**up_gate, **stored(EXPERT + "down_proj", HIDDEN, INNER, dtype, seed=1))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (2, 63), (5, 70), (4, 129), (3, 200), (2, 256)])
def test_the_format_decodes_as_the_formula_says(n: int, k: int) -> None:
    parts = stored("w", n, k, seed=n + k)
    form = CcqFormat()
    held = from_tensors(
        form,
        (n, k),
        {
            "codes": parts["w.quant_weight"].t(),
            "scale": parts["w.weight_scale"].t(),
            "scale2": parts["w.super_scales"][:, None],
            "zero": torch.stack((parts["w.code_scale"], parts["w.code_zp"]), 1),
        },
    )
    wanted = by_hand(parts, "w", k)
    assert torch.equal(held.dequantize(), wanted)
    index = torch.tensor([n - 1, 0])
    assert torch.equal(held.rows(index), wanted[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_are_read(dtype: torch.dtype) -> None:
    tensors = checkpoint(dtype)
    reader = FastDeployReader(tensors, CONFIG)
    both = by_hand(tensors, EXPERT + "up_gate_proj", HIDDEN)
    for name, wanted in (
        ("gate_proj", both[:INNER]),
        ("up_proj", both[INNER:]),
        ("down_proj", by_hand(tensors, EXPERT + "down_proj", INNER)),
    ):
        module, shape = EXPERT + name, tuple(wanted.shape)
        assert reader.holds(module)
        assert len(reader.parts(module)) == 5
        assert set(reader.parts(module)) <= set(tensors)
        read = reader.read(module, shape)
        assert read.format == reader.format(module, shape) == CcqFormat(dtype)
        assert torch.equal(read.dequantize(), wanted)
    assert not reader.holds("model.layers.7.mlp.gate")
    assert not reader.holds("lm_head")


def test_what_is_encoded_here_is_decoded_there() -> None:
    w = torch.randn(8, 200, generator=torch.Generator().manual_seed(2))
    held = CcqFormat().quantize(w)
    parts = {
        "w.quant_weight": held.codes.t(),
        "w.weight_scale": held.tensors()["scale"].t(),
        "w.super_scales": held.tensors()["scale2"][:, 0],
        "w.code_scale": held.tensors()["zero"][:, 0],
        "w.code_zp": held.tensors()["zero"][:, 1],
    }
    assert torch.equal(by_hand(parts, "w", 200), held.dequantize())
    assert float((held.dequantize() - w).norm() / w.norm()) < 0.36  # a byte for four normal numbers


def _without(end: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(EXPERT + "down_proj" + end)


def _changed(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    name = EXPERT + "down_proj" + end
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (_without(".super_scales"), CheckpointError, "no tensor .*super_scales"),
        (_without(".code_zp"), CheckpointError, "no tensor .*code_zp"),
        (_without(".code_scale"), UnsupportedModelError, "down_proj .* not as WINT2"),
        (_changed(".quant_weight", lambda t: t[:-1]), CheckpointError, r"quant_weight is uint8 \[31, 256\]"),
        (_changed(".quant_weight", lambda t: t.to(torch.int8)), CheckpointError, "int8"),
        (_changed(".weight_scale", lambda t: t.repeat(2, 1)), CheckpointError, r"weight_scale .*\[2, 256\]"),
        (_changed(".code_scale", lambda t: t.double()), CheckpointError, "float64"),
        (_changed(".code_zp", lambda t: t * torch.nan), CheckpointError, "NaN"),
        (_changed(".super_scales", lambda t: t / 0), CheckpointError, "infinite"),
    ],
)
def test_what_lies_is_refused(spoil: Callable[[Tensors], object], error: type[QrunError], says: str) -> None:
    tensors = checkpoint()
    spoil(tensors)
    with pytest.raises(error, match=says):
        FastDeployReader(tensors, CONFIG).read(EXPERT + "down_proj", (HIDDEN, INNER))


def test_what_is_in_the_order_of_gpu_kernels_is_refused_by_name() -> None:
    """Attention in int8 and the first layers' experts in int4, as the published checkpoint has them."""
    attention, expert = "model.layers.0.self_attn.", "model.layers.0.mlp.experts.0."
    tensors = Tensors(
        {
            attention + "qkv_proj.quant_weight": torch.zeros(64, 96, dtype=torch.int8),
            attention + "qkv_proj.weight_scale": torch.zeros(96),
            expert + "down_proj.quant_weight": torch.zeros(64, 64, dtype=torch.int8),
            expert + "down_proj.weight_scale": torch.zeros(64),
        }
    )
    reader = FastDeployReader(tensors, CONFIG)
    for module in (attention + "q_proj", attention + "v_proj", expert + "down_proj"):
        assert reader.holds(module)
        with pytest.raises(UnsupportedModelError, match="GPU kernels"):
            reader.format(module, (64, 64))


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": "wint4"},
        {"quantization": 2},
        {"moe_quant_config": {"moe_w2_quant_config": {"quant_type": "wint2.5"}}},
        {"moe_quant_config": {"moe_w2_quant_config": {"quant_type": "wint2", "quant_group_size": 32}}},
    ],
)
def test_other_settings_are_refused_by_name(change: Mapping[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        FastDeployReader(Tensors(), {**CONFIG, **change})


def test_inputs_that_no_kernel_of_theirs_takes_are_refused() -> None:
    reader = FastDeployReader(Tensors(stored("a.down_proj", 8, 192)), CONFIG)
    with pytest.raises(UnsupportedModelError, match="multiple of 128"):
        reader.format("a.down_proj", (8, 192))


def test_a_model_runs_on_its_codes(tmp_path: Path) -> None:
    """Experts as FastDeploy stores them, the rest in BF16, against the same model with what they stand for."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    make("ernie-moe", plain, torch.bfloat16, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2)
    shutil.copytree(plain, packed)
    weights = load_file(plain / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    full, codes = dict(kept), dict(kept)
    for i, name in enumerate(sorted(weights.keys() - kept.keys())):
        expert, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer == "up_proj":
            continue
        fused = f"{expert}.up_gate_proj" if layer == "gate_proj" else f"{expert}.down_proj"
        n, k = weights[name].shape
        parts = stored(fused, 2 * n if layer == "gate_proj" else n, k, seed=i)
        codes |= parts
        both = by_hand(parts, fused, k)
        full[name] = both[:n].contiguous()
        if layer == "gate_proj":
            full[f"{expert}.up_proj.weight"] = both[n:].contiguous()
    save_file(full, plain / "model.safetensors")
    save_file(codes, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    ids = list(range(3, 40))
    wanted = qrun.load(plain, "fp32", device="cpu", context=64, cache=False).logits(ids)
    engine = qrun.load(packed, Recipe.parse("auto", "fp32"), device="cpu", context=64, cache=False)
    assert any("ccq2" in line.scheme for line in engine.card.roles)
    found = engine.logits(ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
