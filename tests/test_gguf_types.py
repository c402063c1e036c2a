"""GGUF's block types against gguf-py, on blocks that ggml's own quantizer made."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qrun.errors import UnsupportedModelError
from qrun.formats import AffineFormat, QTensor, join_rows
from qrun.formats.superblock import SuperBlockFormat
from qrun.gguf_file import GgufFile
from qrun.gguf_names import Piece
from qrun.readers.gguf import PLAIN, GgufReader, expand

HERE = Path(__file__).parent / "fixtures" / "gguf_types"
ORACLE: dict[str, Any] = json.loads((HERE / "oracle.json").read_text())
SHAPE = (ORACLE["rows"], ORACLE["columns"])
LATTICE = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ3_S", "IQ2_S", "IQ1_M", "TQ1_0", "TQ2_0")
HELD = [kind for kind in ORACLE["sha256"] if kind not in LATTICE and kind not in PLAIN]
# Bits per weight of llama.cpp's blocks, scales included.
BITS = {"Q4_0": 4.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


def piece(kind: str) -> Piece:
    return Piece(GgufFile(HERE / "types.gguf"), kind, 0, SHAPE)


def reader(kind: str, **changes: Any) -> GgufReader:
    found: Any = {"m.weight": replace(piece(kind), **changes)}
    return GgufReader(found, found)


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256((values + 0.0).numpy().astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ORACLE["sha256"])
def test_every_type_expands_to_the_bits_that_gguf_py_gives(kind: str) -> None:
    assert digest(expand("m", piece(kind)).float()) == ORACLE["sha256"][kind]


@pytest.mark.parametrize("kind", HELD)
def test_the_codes_keep_every_bit(kind: str) -> None:
    held = reader(kind)
    assert held.holds("m")
    q = held.read("m", SHAPE)
    assert q.format == held.format("m", SHAPE)
    assert {name: (tuple(t.shape), t.dtype) for name, t in q.tensors().items()} == q.format.layout(SHAPE)
    assert digest(q.dequantize()) == ORACLE["sha256"][kind]


@pytest.mark.parametrize("kind", BITS)
def test_the_codes_take_the_bits_that_the_file_takes(kind: str) -> None:
    form = reader(kind).format("m", SHAPE)
    assert form.bits_per_weight(SHAPE) == BITS[kind]


@pytest.mark.parametrize("kind", LATTICE)
def test_lattice_types_are_not_held(kind: str) -> None:
    assert not reader(kind).holds("m")


@pytest.mark.parametrize("kind", [kind for kind in HELD if kind.endswith("_K")])
def test_a_widened_super_block_has_the_same_values(kind: str) -> None:
    q = reader(kind).read("m", SHAPE)
    form = q.format
    assert isinstance(form, SuperBlockFormat)
    wide = form.widen(q)
    assert isinstance(wide.format, AffineFormat)
    assert {name: (tuple(t.shape), t.dtype) for name, t in wide.tensors().items()} == wide.format.layout(SHAPE)
    assert torch.equal(wide.dequantize(), q.dequantize())
    stack = QTensor.empty(form, (2, *SHAPE))
    stack.copy_(0, q)
    stack.copy_(1, q)
    assert torch.equal(form.widen(stack)[1].dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="GGUF"):
        form.quantize(torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="multiple of 256"):
        form.layout((4, 128))


@pytest.mark.parametrize("kind", HELD)
def test_rows_can_be_taken_put_together_and_stacked(kind: str) -> None:
    q = reader(kind).read("m", SHAPE)
    values = q.dequantize()
    order = torch.tensor([5, 0, 3, 3])
    some = q.take_rows(order)
    assert some is not None
    assert torch.equal(some.dequantize(), values[order])
    both = join_rows([q, some])
    assert both is not None
    assert torch.equal(both.dequantize(), torch.cat((values, values[order])))
    assert torch.equal(q.rows(torch.tensor([[4, 1]])), values[torch.tensor([[4, 1]])])


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ2_S", "F16"])
def test_a_run_of_rows_is_one_expert_and_rotary_pairs_become_halves(kind: str) -> None:
    values = expand("m", piece(kind))
    part = replace(piece(kind), first=2, shape=(4, SHAPE[1]), pairs=4)
    assert torch.equal(expand("m", part), values[2:][[0, 2, 1, 3]])
    if kind in HELD:
        held = reader(kind, first=2, shape=(4, SHAPE[1]), pairs=4)
        assert torch.equal(held.read("m", (4, SHAPE[1])).dequantize(), values[2:][[0, 2, 1, 3]])


def test_without_gguf_py_a_lattice_type_is_refused_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UnsupportedModelError, match=r"IQ2_S.*qrun-llm\[gguf\]"):
        expand("m", piece("IQ2_S"))
    assert expand("m", piece("Q4_K")).shape == SHAPE
