"""The rules of a plan's TOML file: which weights of a model a line means, and as few lines as say what a mapping does.

It knows the model by its units; it reads and writes no files, and calls the file by ``where`` in what it raises.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from qrun.errors import RecipeError, UsageError
from qrun.quantize.units import KINDS, LAYER, Unit, modules
from qrun.recipe import BF16, Recipe, WeightScheme

_RANGES: Final = re.compile(r"\d{1,4}(-\d{1,4})?(\s*,\s*\d{1,4}(-\d{1,4})?)*")
_EXAMPLE: Final = '{ weights = "mlp", scheme = "4g32" }'


@dataclass(frozen=True)
class Rule:
    """``weights`` is a kind of units, or how modules' names end; ``layers`` None is all of them."""

    weights: str
    layers: frozenset[int] | None
    scheme: WeightScheme
    ending: re.Pattern[str]

    def reaches(self, unit: Unit) -> bool:
        """Whether it may say anything of a unit."""
        return self.layers is None or unit.layer in self.layers


def apply(rules: Sequence[Rule], units: Iterable[Unit], where: object) -> dict[str, WeightScheme]:
    """Module -> the scheme of the last rule that matches it, else BF16, in the order of use.

    Raises UsageError for a rule that matches nothing.
    """
    schemes: dict[str, WeightScheme] = {}
    used = [False] * len(rules)
    for unit in units:
        here = [(i, rule) for i, rule in enumerate(rules) if rule.reaches(unit)]
        for module in unit.modules():
            schemes[module] = BF16
            for i, rule in here:
                if rule.weights == unit.kind or rule.ending.search(module):
                    schemes[module] = rule.scheme
                    used[i] = True
    if not all(used):
        i = used.index(False)
        raise UsageError(f"{where}: rules[{i}]: {rules[i].weights!r} matches no weight of the model there: correct it")
    return schemes


def parse(value: object, layers: int, where: object) -> list[Rule]:
    """The rules in a TOML value. Raises UsageError or RecipeError, which name the key."""
    if not isinstance(value, list):
        raise UsageError(f"{where}: rules must be a list of tables, as {_EXAMPLE}")
    return [_rule(entry, layers, f"{where}: rules[{i}]") for i, entry in enumerate(cast(list[object], value))]


def _rule(entry: object, layers: int, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be a table, as {_EXAMPLE}")
    table = cast(dict[str, object], entry)
    only(table, ("weights", "layers", "scheme"), where + ".")
    weights, among = text(table, "weights", where + "."), table.get("layers")
    return Rule(
        weights,
        None if among is None else _numbers(among, layers, f"{where}.layers"),
        _scheme(text(table, "scheme", where + "."), f"{where}.scheme"),
        re.compile(r"(?:^|\.)" + r"[^.]+".join(map(re.escape, weights.split("*"))) + r"$"),
    )


def only(table: Mapping[str, object], known: Sequence[str], where: str) -> None:
    """Raise UsageError for a key that is not ``known``."""
    for key in table:
        if key not in known:
            raise UsageError(f"{where}{key} is unknown; possible: {', '.join(known)}")


def text(table: Mapping[str, object], key: str, where: str) -> str:
    """A value that must be a text. Raises UsageError."""
    value = table.get(key)
    if not isinstance(value, str):
        raise UsageError(f"{where}{key} is {'missing' if value is None else repr(value)}: it must be a text")
    return value


def _numbers(value: object, layers: int, where: str) -> frozenset[int]:
    if not isinstance(value, str) or not _RANGES.fullmatch(value.strip()):
        raise UsageError(f'{where} is {value!r}: write layers as "0-3, 7"')
    found: set[int] = set()
    for run in value.split(","):
        first, _, last = run.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    if max(found, default=layers) >= layers:
        raise UsageError(f"{where} is {value!r}, but the model's layers are 0-{layers - 1}")
    return frozenset(found)


def _scheme(term: str, where: str) -> WeightScheme:
    if not re.fullmatch(r"[\w@]+", term):
        raise RecipeError(f"{where} {term!r} is no scheme: write it as --quant does after W, as 4g32 or 16")
    try:
        return Recipe.parse(f"mix:dense={term}").dense
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def lines(units: Sequence[Unit], schemes: Mapping[str, WeightScheme]) -> Iterator[str]:
    """TOML tables, one a line, whose rules give ``schemes``, in which a matrix's modules have one scheme.

    For each kind: what most of its layers have, then layers that differ, then second matrices that do.
    """
    for kind in KINDS:
        same = [unit for unit in units if unit.kind == kind]
        if not same:
            continue
        first = {unit.layer: schemes[next(modules(unit.weights[0]))] for unit in same}
        most = Counter(first.values()).most_common(1)[0][0]
        yield _line(kind, None, most)
        yield from _exceptions(kind, {layer: s for layer, s in first.items() if s != most})
        if len(same[0].weights) > 1:
            second = {unit.layer: schemes[next(modules(unit.weights[1]))] for unit in same}
            ending = _ending(next(modules(same[0].weights[1])))
            yield from _exceptions(ending, {layer: s for layer, s in second.items() if s != first[layer]})


def _exceptions(weights: str, schemes: Mapping[int | None, WeightScheme]) -> Iterator[str]:
    """A rule for each scheme, which names its layers."""
    by_scheme: dict[WeightScheme, list[int]] = {}
    for layer, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(cast(int, layer))
    return (_line(weights, ranges(layers), scheme) for scheme, layers in by_scheme.items())


def _line(weights: str, layers: str | None, scheme: WeightScheme) -> str:
    where = "" if layers is None else f", layers = {quoted(layers)}"
    return f"  {{ weights = {quoted(weights)}{where}, scheme = {quoted(scheme.term.lower())} }},"


def _ending(module: str) -> str:
    """What a module's name has in common with its fellows of other layers and experts."""
    return re.sub(r"\.\d+\.", ".*.", LAYER.sub("", module))


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
