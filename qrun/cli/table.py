"""Rows of plain values as Markdown, CSV, JSON or JSON lines. Knows no models, and streams where the form allows it."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, cast

Form = Literal["md", "csv", "json", "jsonl"]


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int, widths: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the lines of a Markdown table, each as soon as its row comes; the first `left` columns are left-aligned.

    The header waits for the first row, so that what fails before it has printed nothing.

    Columns are as wide as their widest cell if `rows` is a list; else as the header, or as `widths` foresees.
    """
    known = [header, *rows] if isinstance(rows, list) else [header]
    widths = widths or [max(len(row[i]) for row in known) for i in range(len(header))]
    coming = iter(rows)
    first = next(coming, None)
    yield _line(header, widths, left)
    yield "|" + "|".join(_rule(width, i < left) for i, width in enumerate(widths)) + "|\n"
    for row in chain(() if first is None else (first,), coming):
        yield _line(row, widths, left)


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    padded = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |\n"


def _rule(width: int, left: bool) -> str:
    return "-" * (width + 2) if left else "-" * (width + 1) + ":"


def records(form: Form, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield text in `csv`, `json` or `jsonl` for rows of equal keys; JSON comes at once, the others row by row."""
    if form == "json":
        yield json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
        return
    for i, row in enumerate(rows):
        if form == "jsonl":
            yield json.dumps(row, ensure_ascii=False) + "\n"
            continue
        line = io.StringIO()
        writer = csv.writer(line, lineterminator="\n")
        if i == 0:
            writer.writerow(row)
        writer.writerow(map(_plain, row.values()))
        yield line.getvalue()


def _plain(value: object) -> object:
    return " ".join(map(str, cast("tuple[object, ...]", value))) if isinstance(value, tuple) else value
