"""Formats that stand in for others: the same values, exactly."""

import pytest
import torch

from qrun.formats import AffineFormat, CodebookFormat, Format, MxFp4Format, NvFp4Format, QTensor, from_tensors
from qrun.formats.codebook import E2M1, NF4
from qrun.formats.superblock import SuperBlockFormat
from qrun.formats.widened import as_common, common, read_as, readable

FORMS: list[Format] = [
    AffineFormat(8, 0, True),
    AffineFormat(3, 0, True),
    AffineFormat(5, 32, True),
    AffineFormat(6, 64, False),
    AffineFormat(4, 32, False, scale_dtype=torch.float16),
    AffineFormat(4, 16, False, scale_dtype=torch.float16, zero_dtype=torch.float16),
    SuperBlockFormat(4, 32, 6, True),
    SuperBlockFormat(6, 16, 8, False),
    CodebookFormat("fp4", E2M1, 64),
    MxFp4Format(),
    NvFp4Format(),
    NvFp4Format(divides=True),
    CodebookFormat("nf4", NF4, 64),
]


def made(form: Format, *shape: int) -> QTensor:
    """A weight of random codes and scales."""
    torch.manual_seed(0)
    parts = {}
    for name, (size, dtype) in form.layout(shape).items():
        if name == "codes" or (dtype == torch.uint8 and isinstance(form, SuperBlockFormat)):
            parts[name] = torch.randint(0, 256, size, dtype=torch.uint8).view(dtype)
        elif dtype == torch.uint8:
            low, high = (115, 130) if name == "scale" else (0, 2**form.bits)
            parts[name] = torch.randint(low, high, size, dtype=torch.uint8)
        else:
            parts[name] = (torch.rand(size) + 0.1).to(dtype)
    return from_tensors(form, shape, parts)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_what_kernels_read_is_the_same_weight(form: Format) -> None:
    for shape in ((3, 256), (2, 3, 512)):
        weight = made(form, *shape)
        found = readable(weight)
        assert found.format == read_as(form)
        from_tensors(found.format, shape, found.tensors())  # of that layout
        torch.testing.assert_close(found.dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "forms", [(FORMS[6], FORMS[7]), (FORMS[0], FORMS[3]), (FORMS[1], FORMS[4]), (FORMS[5], FORMS[2])], ids=repr
)
def test_different_integers_have_a_format_in_common(forms: tuple[Format, Format]) -> None:
    shared = common(forms)
    assert shared is not None
    for form in forms:
        weight = made(form, 5, 256)
        found = as_common(weight, shared)
        from_tensors(shared, (5, 256), found.tensors())
        torch.testing.assert_close(found.dequantize(), weight.dequantize(), rtol=1e-6, atol=1e-5)


def test_codebooks_have_none() -> None:
    assert common([FORMS[0], FORMS[-1]]) is None
