"""Weights that other tools quantized, against those tools' own dequantizers; the fixtures were made by the tools."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qrun
from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.formats import AffineFormat, PermutedFormat, PlainFormat, QTensor
from qrun.formats.packing import unpack
from qrun.recipe import Recipe
from qrun.tensorfile import TensorFile, TensorWriter

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = sorted(
    path.parent.name for path in FIXTURES.glob("*/oracle.safetensors") if (path.parent / "config.json").exists()
)
UNREAD = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".activation_scale", ".weight_format", ".shape",
    ".channel_wise", ".compute_dtype", ".encoded_state_dict", ".offload_meta", ".optimize", ".packing", ".quant_scale",
    ".quant_zero", ".round_zero", ".stores_quant_config", ".unpack_view_dtype", ".view_as_float",
)  # fmt: skip
"""Of activations, which are rounded by their own values, and what repeats the config or the shapes."""
OPTIONAL = (*UNREAD, ".weight_shape", "g_idx", ".SCB")
"""What can be done without, or makes the weight an ordinary one."""
FEW_ULPS = {"bnb_int8"}
"""The tool multiplies codes, scales and 1/127 in another order, which moves float32's last bit."""


def oracle(name: str) -> dict[str, Tensor]:
    file = TensorFile(FIXTURES / name / "oracle.safetensors")
    return {key: file.read(key) for key in file.entries}


def in_the_models_type(held: QTensor, dtype: torch.dtype) -> QTensor:
    """GPTQ's scales are float16 on disk; gptqmodel brings them to the model's type before it multiplies."""
    form = held.format
    inner = form.inner if isinstance(form, PermutedFormat) else form
    assert isinstance(inner, AffineFormat)
    if inner.group == 0:
        scale = held.scale.to(dtype).float()
        return replace(held, scale=scale)
    inner = replace(inner, scale_dtype=dtype)
    form = PermutedFormat(inner) if isinstance(form, PermutedFormat) else inner
    return replace(held, format=form, scale=held.scale.to(dtype))


def rounded_twice(held: QTensor, dtype: torch.dtype) -> Tensor:
    """HQQ rounds q − zero, then its product with the scale, to the model's type."""
    form = held.format
    assert isinstance(form, AffineFormat)
    codes = unpack(held.codes, form.bits).to(dtype).view(*held.scale.shape, form.group)
    return ((codes - held.zero[..., None]) * held.scale[..., None]).flatten(-2)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_tools_own(name: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    wanted = oracle(name)
    assert wanted
    for key, values in wanted.items():
        form = checkpoint.format(key, values.shape)
        assert form is not None, f"{key} is not seen to be quantized"
        straddles = name.startswith(("bnb_nf4", "bnb_fp4")) and values.shape[1] % 64 != 0  # blocks, the ends of rows
        assert isinstance(form, PlainFormat) == straddles, f"{key} is {form}"
        held = checkpoint.packed(key, values.shape)
        assert torch.equal(held.dequantize(), checkpoint.weight(key, values.shape))
        if name.startswith(("gptq", "autoround")) and not isinstance(form, PlainFormat):
            held = in_the_models_type(held, values.dtype)
        found = held.dequantize()
        if name.startswith("hqq"):
            found = rounded_twice(held, values.dtype)
        if name in FEW_ULPS:
            torch.testing.assert_close(found.to(values.dtype), values, rtol=2**-8, atol=0)
            torch.testing.assert_close(found, values.float(), rtol=2**-8, atol=0)
        else:
            assert torch.equal(found.to(values.dtype), values), f"{key}: {(found - values).abs().max()}"


def expanded(name: str, place: Path) -> Path:
    """The same model with the oracle's values in the place of the codes: an ordinary float32 checkpoint."""
    checkpoint, values = Checkpoint.open(FIXTURES / name), oracle(name)
    parts = {part for key in values for part in checkpoint.sources(key)}
    place.mkdir()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (place / "config.json").write_text(json.dumps(config))
    reader = checkpoint.reader
    assert reader is not None
    with TensorWriter(place / "model.safetensors") as writer:
        for key, tensor in values.items():
            writer.add(key, tensor.float())
        for key in checkpoint.names():
            if key not in parts and not reader.spare(key):
                writer.add(key, checkpoint.read(key).float())
    return place


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_with_them(name: str, tmp_path: Path) -> None:
    """Rows are rearranged and put together in their codes: the same as with the numbers, and on the CPU's kernels."""
    full = expanded(name, tmp_path / "full")
    vocab = Checkpoint.open(full).shape("model.embed_tokens.weight")[0]
    ids = [i % vocab for i in (3, 77, 14, 120, 55, 9, 81, 2)]
    wanted = qrun.load(full, "fp32", device="cpu", context=64).logits(ids)
    engine = qrun.load(FIXTURES / name, Recipe.parse("auto", "fp32"), device="cpu", context=64, cache=False)
    found = engine.logits(ids)
    assert torch.isfinite(wanted).all()
    # Where the tool rounds activations too, qrun does.
    assert (found - wanted).norm() / wanted.norm() < (0.02 if engine.card.activations == "16" else 0.15)


def rewritten(name: str, place: Path, *, change: dict[str, Tensor | None], config: dict[str, object]) -> Path:
    """The fixture with other tensors, or without some, and with other settings."""
    checkpoint = Checkpoint.open(FIXTURES / name)
    place.mkdir(exist_ok=True)
    quantization = {**checkpoint.config["quantization_config"], **config}
    (place / "config.json").write_text(json.dumps({**checkpoint.config, "quantization_config": quantization}))
    with TensorWriter(place / "model.safetensors") as writer:
        for key in checkpoint.names():
            tensor = change.get(key, checkpoint.read(key))
            if tensor is not None:
                writer.add(key, tensor)
    return place


@pytest.mark.parametrize("name", MODELS)
def test_damaged_tensors_are_refused(name: str, tmp_path: Path) -> None:
    """Each tensor of a quantized weight missing, of another shape, or of another type: one clear error, no other."""
    checkpoint = Checkpoint.open(FIXTURES / name)
    key = next(iter(oracle(name)))
    for part in checkpoint.sources(key):
        tensor = checkpoint.read(part)
        flat = tensor.reshape(-1)[:1].to(torch.int64)
        for other in (None, torch.zeros(3, 5, dtype=tensor.dtype), flat):
            nothing = name == "quark_mixed" and part.endswith("down_proj.weight_zero_point")  # of symmetric codes
            if other is None and (part.endswith(OPTIONAL) or nothing):
                continue
            place = rewritten(name, tmp_path / "damaged", change={part: other}, config={})
            try:
                qrun.load(place, device="cpu", context=64, cache=False)
            except CheckpointError as error:
                assert "\n" not in str(error)
            else:
                assert part.endswith(UNREAD), f"{part} is not checked"


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_checked(name: str, tmp_path: Path) -> None:
    """Every value of the config replaced by each of some that make no sense: it loads, or it is refused in a line."""
    config = Checkpoint.open(FIXTURES / name).config["quantization_config"]
    for key in config:
        if key == "quant_method":
            continue
        for value in (None, -1, 0, 10**12, 1.5, True, "", "x" * 9, [], [0], {}, {"a": {"targets": 3}}, "(a+)+$"):
            place = rewritten(name, tmp_path / "changed", change={}, config={key: value})
            try:
                checkpoint = Checkpoint.open(place)
                for weight, values in oracle(name).items():
                    checkpoint.weight(weight, values.shape)
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    name, key = "ct_w4a16_g32", "model.layers.0.mlp.up_proj.weight"
    scale = Checkpoint.open(FIXTURES / name).read(key + "_scale")
    scale[1, 0] = torch.inf
    place = rewritten(name, tmp_path / "infinite", change={key + "_scale": scale}, config={})
    with pytest.raises(CheckpointError, match=r"up_proj.weight has a scale that is NaN or infinite"):
        qrun.load(place, device="cpu", context=64)


@pytest.mark.parametrize("method", ["exl3", "aqlm", "qqq", None, 3])
def test_other_methods_are_refused_by_name(method: object, tmp_path: Path) -> None:
    place = rewritten("ct_w4a16_g32", tmp_path / "other", change={}, config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=f"quant_method '?{method or 'unnamed'}"):
        Checkpoint.open(place)


def test_they_can_be_quantized_again(tmp_path: Path) -> None:
    engine = qrun.load(FIXTURES / "ct_w4a16_g32", "wint8", device="cpu", context=64, cache=False)
    assert {line.scheme for line in engine.card.roles if line.role == "dense"} == {"int8 channel"}
    assert any("quantized again" in note for note in engine.card.notes)
