"""Which format each weight of a model has: that of its role in the recipe, or the one its checkpoint stores it in."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from qrun.checkpoint import Checkpoint
from qrun.formats import AffineFormat, Format, PlainFormat, QTensor, format_of, join_rows
from qrun.formats.widened import as_common, common
from qrun.models.plan import Source, Weight
from qrun.recipe import Recipe

Formats: TypeAlias = Callable[[Weight], Format | None]
"""A weight's format, or none where it is kept as float32 numbers."""
WIDE = PlainFormat(torch.bfloat16)
"""What tensors become that are one weight, but are stored in ways that do not go together."""


def by_recipe(recipe: Recipe) -> Formats:
    """Every weight in its role's format."""
    formats = {role: format_of(scheme) for role, scheme in recipe.schemes().items()}
    return lambda weight: None if weight.role == "kept" else formats[weight.role]


def by_checkpoint(checkpoint: Checkpoint, recipe: Recipe) -> Formats:
    """Weights that the checkpoint quantizes as it stores them, the others in their roles' formats.

    Asking raises `CheckpointError` if tensors are not what the model's shapes make them.
    """
    others = by_recipe(recipe)

    def find(weight: Weight) -> Format | None:
        other = others(weight)
        if other is None:
            return None
        formats = {_format(checkpoint, part) for part in weight.parts}
        if formats == {None}:
            return other
        return (formats.pop() if len(formats) == 1 else None) or WIDE

    return find


def stored(checkpoint: Checkpoint, part: Sequence[Source], form: Format) -> QTensor | None:
    """The codes of a matrix's tensors, one under another, in the format that `by_checkpoint` found for it; none where
    they must be expanded."""
    if any(checkpoint.format(source.name, source.shape) is None for source in part):
        return None
    found: list[QTensor] = []
    for source in part:
        held = checkpoint.packed(source.name, source.shape)
        if held.format != form and isinstance(form, AffineFormat) and form.minimum:
            held = as_common(held, form)
        elif held.format != form:
            held = held.format.apart(held)
        turned = held.take_rows(halves(torch.arange(source.shape[0]), source.pairs)) if source.pairs else held
        if turned is None or turned.format != form:
            return None
        found.append(turned)
    return found[0] if len(found) == 1 else join_rows(found)


def halves(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Rows in heads of ``width`` whose rotary pairs are (2i, 2i+1) -> the same rows with pairs (i, i + width/2)."""
    if not width:
        return tensor
    heads = tensor.view(tensor.shape[0] // width, width // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def _format(checkpoint: Checkpoint, part: Sequence[Source]) -> Format | None:
    """The one format in which the tensors can be put one under another; WIDE where there is none, none where all are
    plain numbers."""
    found = [checkpoint.format(source.name, source.shape) for source in part]
    formats = [form for form in found if form is not None]
    if len(formats) < len(found):
        return WIDE if formats else None
    first = formats[0]
    if any(form != first for form in formats):
        return common(formats) or WIDE
    if len(part) == 1 and not part[0].pairs:
        return first
    alone = first.row_align == 1 and len({repr(checkpoint.shared(source.name)) for source in part}) == 1
    if alone or _meet(part, first):
        return first
    return first.independent or WIDE


def _meet(part: Sequence[Source], form: Format) -> bool:
    """Whether blocks of rows end where the tensors do, and where heads do if their rows are rearranged."""
    align = form.row_align
    return (
        align > 1
        and all(source.shape[0] % align == 0 for source in part[:-1])
        and all(align % source.pairs == 0 for source in part if source.pairs)
    )
