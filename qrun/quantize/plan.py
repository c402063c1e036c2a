"""A plan: which scheme each weight of one model gets, as a mapping by module name and as TOML that a person can edit.

It knows a model by its config alone: no tensors, no files but its own, and not why a scheme was chosen.
"""

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

from qrun.errors import RecipeError, UsageError
from qrun.models.config import ModelConfig
from qrun.models.plan import Weight, plan
from qrun.quantize.rules import apply, lines, only, parse, quoted, text
from qrun.quantize.units import Unit, modules, units, weight_bytes
from qrun.recipe import ActivationType, CacheType, Recipe, WeightScheme

MOST_BYTES: Final = 1 << 20
_KEYS: Final = ("activations", "kv", "rules", "model")
_ABOUT: Final = """\
# Which precision each weight of a model gets. The last rule that matches a weight counts; without one it stays bf16.
#   weights: attention, mlp, experts, shared_experts, lm_head, embedding, or how a module's name ends, with * for one
#            part of it: "down_proj", "self_attn.o_proj", "experts.*.down_proj"
#   layers:  "0-3, 7"; all of them where there is no such key
#   scheme:  as --quant writes it after W: 2, 3g64, 4g32sym, 8@channel, fp8, nf4, 16 ...
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The scheme of every module of a model that can be quantized, and what its activations and cache are.

    ``schemes`` has every such module, in the order of use; what is made one matrix here (q, k and v; gate and up; the
    same of all experts of a layer) has one scheme. ``label`` is what the model was called.
    """

    label: str
    config: ModelConfig
    tied: bool
    schemes: Mapping[str, WeightScheme]
    activations: ActivationType = "16"
    k: CacheType = "bf16"
    v: CacheType = "bf16"

    def __post_init__(self) -> None:
        """Raises RecipeError where parts of one matrix have several schemes."""
        for weight in self._weights():
            first, *others = modules(weight)
            for other in others:
                if self.schemes[other] != self.schemes[first]:
                    raise RecipeError(
                        f"{first} is {self.schemes[first].term} and {other} is {self.schemes[other].term}, but they "
                        "are one matrix here: give both the same scheme"
                    )

    @classmethod
    def uniform(cls, config: ModelConfig, recipe: Recipe, *, tied: bool, label: str = "") -> Self:
        """The plan that says what ``recipe`` does."""
        of = recipe.schemes()
        schemes = {
            module: of[weight.role]
            for weight in plan(config, tied=tied)
            if weight.role != "kept"
            for module in modules(weight)
        }
        return cls(
            label=label, config=config, tied=tied, schemes=schemes,
            activations=recipe.activations, k=recipe.k, v=recipe.v,
        )  # fmt: skip

    @classmethod
    def of_units(
        cls, config: ModelConfig, chosen: Iterable[tuple[Unit, WeightScheme]], recipe: Recipe, *, tied: bool,
        label: str = "",
    ) -> Self:  # fmt: skip
        """One scheme for each of `units`; activations and cache as ``recipe`` has them."""
        schemes = {module: scheme for unit, scheme in chosen for module in unit.modules()}
        return cls(
            label=label, config=config, tied=tied, schemes=schemes,
            activations=recipe.activations, k=recipe.k, v=recipe.v,
        )  # fmt: skip

    def scheme(self, weight: Weight) -> WeightScheme:
        """Of one of the decoder's weights that can be quantized."""
        return self.schemes[next(modules(weight))]

    @property
    def kv(self) -> str:
        """The cache as ``--kv`` takes it."""
        return Recipe("", k=self.k, v=self.v).kv

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in it, scales and padding included; not what is never quantized."""
        return sum(weight_bytes(weight, self.scheme(weight)) for weight in self._weights())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, over the weights in it."""
        return 8 * self.nbytes / sum(math.prod(weight.shape) for weight in self._weights())

    def _weights(self) -> Iterator[Weight]:
        return (weight for weight in plan(self.config, tied=self.tied) if weight.role != "kept")

    @classmethod
    def read(cls, path: Path, config: ModelConfig, *, tied: bool) -> Self:
        """The plan in a TOML file, for the model that ``config`` describes.

        Raises:
            UsageError: the file cannot be read, is no TOML, has an unknown key, or was made for another model.
            RecipeError: a scheme does not parse, or parts of one matrix have several.
        """
        content = _load(path)
        only(content, _KEYS, f"{path}: ")
        label = _check_model(content.get("model"), _facts(config, tied), path)
        recipe = _recipe(content, path)
        rules = parse(content.get("rules"), config.layers, path)
        schemes = apply(rules, units(config, tied=tied), path)
        try:
            return cls(
                label=label, config=config, tied=tied, schemes=schemes,
                activations=recipe.activations, k=recipe.k, v=recipe.v,
            )  # fmt: skip
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write it as TOML, a rule for as many weights as possible; `read` gives an equal plan.

        Raises:
            UsageError: the file cannot be written.
        """
        beside = path.with_name(f".{path.name}.part")
        try:
            try:
                beside.write_text(self.toml(), encoding="utf-8")
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write the plan {path}: {error.strerror or error}") from None

    def toml(self) -> str:
        """The text that `write` writes."""
        facts = _facts(self.config, self.tied)
        return _ABOUT + "\n".join(
            [
                f"activations = {quoted(self.activations)}",
                f"kv = {quoted(self.kv)}",
                "rules = [",
                *lines(units(self.config, tied=self.tied), self.schemes),
                "]\n",
                "[model]  # what the plan was made for; all but the label must agree",
                f"label = {quoted(self.label)}",
                *(f"{key} = {quoted(v) if isinstance(v, str) else str(v).lower()}" for key, v in facts.items()),
                "",
            ]
        )


def _facts(config: ModelConfig, tied: bool) -> dict[str, str | int | bool]:
    """What a plan's model must have in common with the one that it is used for."""
    experts = 0 if config.moe is None else config.moe.experts
    return {
        "family": config.family, "layers": config.layers, "hidden": config.hidden, "experts": experts, "tied": tied,
    }  # fmt: skip


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror or error}") from None
    if len(raw) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES} bytes: that is no plan")
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no plan: {error}") from None


def _check_model(table: object, facts: Mapping[str, object], path: Path) -> str:
    """The label, of a model that has these facts."""
    if not isinstance(table, dict):
        raise UsageError(f"{path} has no table [model], which says what model the plan is for")
    found = cast(dict[str, object], table)
    only(found, ("label", *facts), f"{path}: model.")
    label = text(found, "label", f"{path}: model.")
    for key, value in facts.items():
        if type(found.get(key)) is not type(value) or found[key] != value:
            raise UsageError(
                f"{path}: model.{key} is {found.get(key)!r}, but this model's is {value!r}: the plan was made for "
                f"another model ({label!r})"
            )
    return label


def _recipe(content: dict[str, Any], path: Path) -> Recipe:
    """What the plan says of activations and cache; 16 bits where nothing."""
    given = {"activations": "16", "kv": "bf16"} | content
    activations, kv = (text(given, key, f"{path}: ") for key in ("activations", "kv"))
    if not activations.isalnum():
        raise RecipeError(f"{path}: activations is {activations!r}: write 16, int8 or fp8")
    try:
        return Recipe.parse(f"mix:act={activations}", kv)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
