"""The precision grammar: ``wint4``, ``W4A16C8``, ``mix:experts=w4,dense=w8`` -> a :class:`Recipe`.

Words to schemes and back. It knows no tensors, no models and no devices, and does not import torch.

    quant   := auto | alias | [W weight] [A activation] [C cache] | "mix:" part ("," part)*
    weight  := bits [@channel | gN] [sym | asym] | bf16 | fp32 | 16 | 32 | fp8 | nf4 | fp4 | mxfp4 | nvfp4 |
               trellis
    bits    := 2 … 8, optionally written int2 … int8
    part    := weight | role "=" weight | act "=" activation | kv "=" cache | k "=" cache | v "=" cache
    cache   := bf16 | fp32 | int8 | int4 | fp8 | 16 | 32 | 8 | 4 | "k" cache "v" cache

Upper and lower case mean the same, and a missing part means 16. Where a word leaves the details open:

- ``W8`` is one symmetric scale per output channel; the narrower integers have a zero point and a scale per 64 weights
  (``W2``: per 32), found by an error-minimising search; ``W8g64`` is symmetric.
- ``@channel`` is FastDeploy's arithmetic to the letter: absmax scales, head and embedding left in BF16.
- ``auto`` is BF16, but for weights that the checkpoint has quantized already: these stay as it stores them.
- Head and embedding are int8 per channel beside integer and codebook weights, else as the weights; BF16 beside fp8.
- In a mix, dense is the bare weight, else BF16; what else is not named follows dense by the rules above.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self, TypeAlias, TypeVar, cast, get_args

from qrun.errors import RecipeError

WeightType: TypeAlias = Literal["bf16", "fp32", "int", "fp8", "nf4", "fp4", "mxfp4", "nvfp4", "trellis"]
ActivationType: TypeAlias = Literal["16", "32", "int8", "fp8"]
CacheType: TypeAlias = Literal["bf16", "fp32", "int8", "int4", "fp8"]
Role: TypeAlias = Literal["dense", "experts", "lm_head", "embedding"]
_T = TypeVar("_T", bound=str)

ROLES: Final[tuple[Role, ...]] = get_args(Role)
GROUPS: Final = (32, 64, 128)

_BLOCKS: Final[Mapping[str, str]] = {
    "fp8": "128x128", "nf4": "g64", "fp4": "g64", "mxfp4": "g32", "nvfp4": "g16", "trellis": "g32",
}  # fmt: skip
_NAMED_BITS: Final[Mapping[str, int]] = {
    "bf16": 16, "fp32": 32, "fp8": 8, "nf4": 4, "fp4": 4, "mxfp4": 4, "nvfp4": 4, "trellis": 2,
}  # fmt: skip
_ALIASES: Final[Mapping[str, str]] = {
    "bf16": "w16",
    "fp32": "w32a32c32",
    "fp8": "wfp8afp8",
    "block_wise_fp8": "wfp8afp8",
}
_ACTIVATIONS: Final[Mapping[str, ActivationType]] = {
    "16": "16", "bf16": "16", "32": "32", "fp32": "32", "8": "int8", "int8": "int8", "fp8": "fp8",
}  # fmt: skip
_CACHES: Final[Mapping[str, CacheType]] = {
    "16": "bf16", "bf16": "bf16", "32": "fp32", "fp32": "fp32", "8": "int8", "int8": "int8",
    "4": "int4", "int4": "int4", "fp8": "fp8",
}  # fmt: skip
_SHORT: Final[Mapping[str, str]] = {"bf16": "16", "fp32": "32", "int8": "8", "int4": "4"}

_INT_TERM: Final = re.compile(r"(?:int)?(?P<bits>\d+)(?:@(?P<at>[a-z]*)|g(?P<group>\d*))?(?P<sym>a?sym)?")
_NAMES: Final = "auto|bf16|fp32|fp8|nf4|fp4|mxfp4|nvfp4|trellis"
_WEIGHT: Final = rf"(?:{_NAMES}|{re.sub(r'[?]P<[a-z]+>', '?:', _INT_TERM.pattern)})"
_CODE: Final = re.compile(rf"w?(?P<w>{_WEIGHT})?(?:a(?P<a>[^c]*))?(?:c(?P<c>.*))?")

POSSIBLE: Final = (
    "auto, bf16, wint8, wint4, wint2, W4g32, W4@channel, w8a8, fp8, nf4, fp4, mxfp4, nvfp4, trellis, fp32, "
    "any W…A…C… such as W4A16C8, or mix:experts=w4,dense=w8"
)
POSSIBLE_WEIGHTS: Final = "2 to 8 (with g32, g64, g128 or @channel), 16, 32, fp8, nf4, fp4, mxfp4, nvfp4, trellis"
POSSIBLE_ACTIVATIONS: Final = "16, 32, 8, fp8"
POSSIBLE_CACHES: Final = "bf16, fp32, int8, int4, fp8, or K and V apart as in k8v4"


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of one role are stored.

    ``group`` is the number of consecutive inputs that share a scale: 0 is one scale per output channel, None the block
    that the type fixes by itself. ``symmetric`` means no zero point.
    """

    type: WeightType
    bits: int
    group: int | None = None
    symmetric: bool = True

    def __str__(self) -> str:
        """The scheme in words, unambiguous: ``int4 g64``, ``int8 channel``, ``fp8 128x128``, ``bf16``."""
        if self.type != "int":
            return f"{self.type} {_BLOCKS[self.type]}" if self.type in _BLOCKS else self.type
        if self.group == 0:
            return f"int{self.bits} channel"
        usual = self.symmetric == (self.bits == 8)
        return f"int{self.bits} g{self.group}" + ("" if usual else " sym" if self.symmetric else " asym")

    @property
    def term(self) -> str:
        """The scheme as the grammar writes it after ``W``: ``4``, ``4g32sym``, ``NF4``, ``16``."""
        if self.type != "int":
            return _SHORT.get(self.type, self.type if self.type == "fp8" else self.type.upper())
        if self == _default_int(self.bits):
            return str(self.bits)
        return str(self).removeprefix("int").replace(" channel", "@channel").replace(" ", "")


BF16: Final = WeightScheme("bf16", 16)
_INT8_CHANNEL: Final = WeightScheme("int", 8, 0)


@dataclass(frozen=True)
class Recipe:
    """Which precision each part of a model has. Recipes are equal when they mean the same, however they were spelled.

    The router, the norms and the biases are no part of it: they keep their own precision.
    """

    name: str = field(compare=False)  # as typed, in lower case
    dense: WeightScheme = BF16
    experts: WeightScheme = BF16
    lm_head: WeightScheme = BF16
    embedding: WeightScheme = BF16
    activations: ActivationType = "16"
    k: CacheType = "bf16"
    v: CacheType = "bf16"
    own: bool = False  # weights that the checkpoint quantizes stay as it stores them

    @classmethod
    def parse(cls, quant: str = "bf16", kv: str | None = None) -> Self:
        """The recipe that ``quant`` names; ``kv``, when given, takes the place of its C part.

        Raises:
            RecipeError: a part does not parse; the message names the part and lists what is possible.
        """
        name = quant.strip().lower()
        parsed = cls._parse_mix(name) if name.startswith("mix:") else cls._parse_code(name)
        return parsed if kv is None else parsed.with_kv(kv)

    @classmethod
    def _parse_code(cls, name: str) -> Self:
        match = _CODE.fullmatch(_ALIASES.get(name, name))
        if match is None and re.match("w.", name):
            raise RecipeError(f"weight type {name[1:]!r} in {name!r} is unknown; possible: {POSSIBLE_WEIGHTS}")
        if match is None or not any(part is not None for part in match.group("w", "a", "c")):
            raise RecipeError(f"quant {name!r} is not a precision; possible: {POSSIBLE}")
        weight, activation, cache = match.group("w", "a", "c")
        k, v = _parse_kv(cache, f"C{cache} in {name!r}") if cache is not None else ("bf16", "bf16")
        act = _lookup(_ACTIVATIONS, activation, f"A{activation} in {name!r}", POSSIBLE_ACTIVATIONS)
        own = weight == "auto"
        return cls(name, **_roles("16" if own else weight or "16", name), activations=act, k=k, v=v, own=own)

    @classmethod
    def _parse_mix(cls, name: str) -> Self:
        roles: dict[Role, WeightScheme] = {}
        activations: ActivationType = "16"
        k: CacheType = "bf16"
        v: CacheType = "bf16"
        seen: set[str] = set()
        for part in name.removeprefix("mix:").split(","):
            key, equals, value = (text.strip() for text in part.partition("="))
            if not equals:
                key, value = "", key
            if key in seen:
                raise RecipeError(f"mix names {key or 'the bare weight'!r} twice in {name!r}; keep one of the two")
            seen.add(key)
            where = f"{part.strip()!r} in {name!r}"
            match key:
                case "":
                    roles = {**_roles(value.removeprefix("w"), where), **roles}
                case "dense" | "experts" | "lm_head" | "embedding":
                    roles[key] = _weight(value.removeprefix("w"), where)
                case "act":
                    activations = _lookup(_ACTIVATIONS, value.removeprefix("a"), where, POSSIBLE_ACTIVATIONS)
                case "kv":
                    k, v = _parse_kv(value, where)
                case "k":
                    k = _lookup(_CACHES, value, where, POSSIBLE_CACHES)
                case "v":
                    v = _lookup(_CACHES, value, where, POSSIBLE_CACHES)
                case _:
                    raise RecipeError(f"mix has no part {key!r} ({where}); possible: {', '.join(ROLES)}, act, kv, k, v")
        roles = {**_following(roles.get("dense", BF16)), **roles}
        return cls(name, **roles, activations=activations, k=k, v=v, own=False)

    def with_kv(self, kv: str) -> Self:
        """The same weights and activations with another cache: ``int8``, ``fp8``, ``k8v4`` ….

        Raises:
            RecipeError: ``kv`` does not parse.
        """
        k, v = _parse_kv(kv.strip().lower(), f"kv {kv!r}")
        return replace(self, k=k, v=v)

    def schemes(self) -> dict[Role, WeightScheme]:
        """Role -> scheme, in the order in which they are printed."""
        return {"dense": self.dense, "experts": self.experts, "lm_head": self.lm_head, "embedding": self.embedding}

    @property
    def label(self) -> str:
        """The shortest spelling that means this recipe, as ``W4A16C8`` or ``mix:…``; :meth:`parse` reads it back."""
        act = self.activations.removeprefix("int")
        cache = _kv_term(self.k, self.v)
        if self.own:
            return "auto" + (f"A{act}" if act != "16" else "") + (f"C{cache}" if cache != "16" else "")
        for term in (self.dense.term, f"{self.dense.bits}@channel"):
            text = f"W{term}A{act}C{cache}"
            if (self.dense.type == "int" or term == self.dense.term) and Recipe.parse(text) == self:
                return text
        usual = {**_following(self.dense), "dense": BF16}
        parts = [f"{role}=w{scheme.term.lower()}" for role, scheme in self.schemes().items() if scheme != usual[role]]
        parts += [f"act={act}"] if act != "16" else []
        parts += [f"kv={cache}"] if cache != "16" else []
        return "mix:" + ",".join(parts)

    @property
    def kv(self) -> str:
        """The cache part by itself, as ``--kv`` takes it: ``int8``, ``k8v4``."""
        return self.k if self.k == self.v else _kv_term(self.k, self.v)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should hear before trusting this recipe; empty for the usual ones."""
        narrow = sorted({str(s) for s in self.schemes().values() if s.bits < 4})
        if not narrow:
            return ()
        return (f"{', '.join(narrow)}: rounding without calibration data costs much quality below 4 bits",)


def _default_int(bits: int) -> WeightScheme:
    if bits == 8:
        return _INT8_CHANNEL
    return WeightScheme("int", bits, 32 if bits == 2 else 64, symmetric=False)


def _weight(text: str, where: str) -> WeightScheme:
    """One weight term, without its ``w``."""
    named = {"16": "bf16", "32": "fp32", "block_wise_fp8": "fp8"}.get(text, text)
    if named in _NAMED_BITS:
        return WeightScheme(cast(WeightType, named), _NAMED_BITS[named])
    match = _INT_TERM.fullmatch(text)
    if match is None:
        raise RecipeError(f"weight type {text!r} ({where}) is unknown; possible: {POSSIBLE_WEIGHTS}")
    bits = int(match["bits"])
    if not 2 <= bits <= 8:
        raise RecipeError(f"{bits}-bit weights ({where}) do not exist here; possible: {POSSIBLE_WEIGHTS}")
    if match["at"] is not None:
        if match["at"] != "channel" or match["sym"] == "asym":
            raise RecipeError(f"'@{match['at']}{match['sym'] or ''}' ({where}) is unknown; write @channel (symmetric)")
        return WeightScheme("int", bits, 0)
    default = _default_int(bits)
    group = default.group if match["group"] is None else int(match["group"] or 0)
    if group == 0 and match["group"] is None and match["sym"] == "asym":
        raise RecipeError(f"{text!r} ({where}) has one scale per channel and no zero point; write {bits}g64asym")
    if group not in GROUPS and match["group"] is not None:
        raise RecipeError(f"group size {match['group']!r} ({where}) is not possible; write g32, g64 or g128")
    symmetric = bits == 8 if match["sym"] is None else match["sym"] == "sym"
    return WeightScheme("int", bits, group, symmetric)


def _beside(weights: WeightScheme) -> WeightScheme:
    """What head and embedding are when only the weights were named."""
    if weights.type in ("bf16", "fp32"):
        return weights
    return BF16 if weights.type == "fp8" else _INT8_CHANNEL


def _following(dense: WeightScheme) -> dict[Role, WeightScheme]:
    """All four roles where only ``dense`` was named."""
    return {"dense": dense, "experts": dense, "lm_head": _beside(dense), "embedding": _beside(dense)}


def _roles(term: str, where: str) -> dict[Role, WeightScheme]:
    """All four roles from one bare weight term."""
    roles = _following(_weight(term, where))
    if "@channel" in term:  # as FastDeploy
        roles |= {"lm_head": BF16, "embedding": BF16}
    return roles


def _lookup(table: Mapping[str, _T], text: str | None, where: str, possible: str) -> _T:
    if text is None:
        text = "16"
    if text not in table:
        raise RecipeError(f"{where} is unknown; possible: {possible}")
    return table[text]


def _parse_kv(text: str, where: str) -> tuple[CacheType, CacheType]:
    apart = re.fullmatch(r"k(?P<k>[^v]*)v(?P<v>.*)", text)
    k, v = apart.group("k", "v") if apart else (text, text)
    return _lookup(_CACHES, k, where, POSSIBLE_CACHES), _lookup(_CACHES, v, where, POSSIBLE_CACHES)


def _kv_term(k: CacheType, v: CacheType) -> str:
    short = [_SHORT.get(name, name) for name in (k, v)]
    return short[0] if k == v else f"k{short[0]}v{short[1]}"
