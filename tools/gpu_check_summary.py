"""The tables that gpu_check prints, with what was measured set against the machine's bandwidth and against the peers.

It reads the report's records and measures nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

Record = dict[str, Any]
Report = Mapping[str, Any]

MARKS: Final = ("cuBLAS bf16", "SDPA")
"""What kernels of the same shape are compared with."""
LIKE: Final = {"wint4": "int4", "bf16": "bf16"}
"""Which of the peers' weights a recipe is compared with; all others with BF16."""


def section_text(section: str, report: Report) -> str:
    """What a section found, and what failed in it."""
    rows = [row for row in report["rows"] if row["section"] == section]
    went = report["sections"].get(section, {})
    lines = ["", f"== {section}: {went.get('seconds', 0)} of {went.get('given', 0)} s, ended {went.get('ended')} =="]
    lines += _TEXTS[section](rows, report) if rows else ["nothing measured"]
    for error in report["errors"]:
        if error["section"] == section:
            where = f" ({error['where']})" if "where" in error else ""
            lines.append(f"FAILED {error['key']}: {error['error']}{where}")
    if skipped := [record["key"] for record in report["skipped"] if record["section"] == section]:
        lines.append(f"skipped, no time: {'; '.join(skipped)}")
    if not rows and "log" in went:
        lines.append(str(went["log"])[-1500:])
    return "\n".join(lines)


def ending(report: Report, seconds: float, path: object) -> str:
    """The last lines."""
    skipped = sorted({record["section"] for record in report["skipped"]})
    lines = ["", f"{len(report['rows'])} rows, {len(report['errors'])} failures in {seconds:.0f} s, all in {path}"]
    if skipped:
        lines.append(f"no time for all of: {', '.join(skipped)} (more with --minutes, or --only)")
    return "\n".join(lines)


def read_bandwidth(report: Report) -> float:
    """Bytes a second that were measured on this machine, or 0."""
    return float(next((row["read"] for row in report["rows"] if row["key"] == "bandwidth"), 0.0))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ([text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join([line[0].ljust(widths[0]), *right[1:]]) for line, right in zip(lines, padded, strict=True)]


def ratio(value: float, base: float | None) -> str:
    """``1.25x``, or nothing without a base."""
    return f"{value / base:.2f}x" if base else ""


def share(value: float, whole: float) -> str:
    return f"{value / whole:.0%}" if whole else ""


def _machine(rows: Sequence[Record], report: Report) -> list[str]:
    found: Record = {}
    for row in rows:
        found |= row
    lines = [
        f"{found.get('gpu')}, sm_{found.get('capability')}, driver {found.get('driver_version')}, "
        f"torch {found.get('torch')}, triton {report['versions'].get('triton')}"
    ]
    if "read" in found:
        speeds = ", ".join(f"{name} {found[name] / 1e9:.0f}" for name in ("read", "copy", "sum", "dot", "amax"))
        lines.append(f"GB/s: {speeds}")
    return lines


def _tests(rows: Sequence[Record], report: Report) -> list[str]:
    names = ("passed", "failed", "error", "errors", "skipped")
    return [", ".join(f"{row[name]} {name}" for row in rows for name in names if name in row)]


def _kernels(rows: Sequence[Record], report: Report) -> list[str]:
    read = read_bandwidth(report)
    marks = {(row["what"], row["shape"]): row["seconds"] for row in rows if row["kernel"] in MARKS}
    lines: list[str] = []
    for what in dict.fromkeys(row["what"] for row in rows):
        some = [row for row in rows if row["what"] == what]
        counted = what == "2048 tokens"
        head = [what, "shape", "us", *(["TFLOP/s"] if counted else ["GB/s", "of read"]), "vs torch BF16"]
        lines += ["", *table(head, (_kernel_line(row, counted, read, marks) for row in some))]
    return lines[1:]


def _kernel_line(row: Record, counted: bool, read: float, marks: Mapping[tuple[str, str], float]) -> list[str]:
    seconds = row["seconds"]
    if counted:
        speed = [f"{row['operations'] / seconds / 1e12:.0f}"]
    else:
        speed = [f"{row['bytes'] / seconds / 1e9:.0f}", share(row["bytes"] / seconds, read)]
    mark = marks.get((row["what"], row["shape"]))
    return [row["kernel"], row["shape"], f"{seconds * 1e6:.1f}", *speed, "" if mark is None else ratio(mark, seconds)]


def _models(rows: Sequence[Record], report: Report) -> list[str]:
    read = read_bandwidth(report)
    peers = {(row["model"], row["recipe"]): row["tokens_per_second"] for row in _of(report, "peers")}
    lines: list[list[str]] = []
    for row in sorted((row for row in rows if "test" in row), key=lambda row: list(row["model"])):
        speed = row["tokens_per_second"]
        bound = share(speed * row["bytes_per_token"], read) if "bytes_per_token" in row else ""
        peer = peers.get((row["model"], LIKE.get(row["recipe"], "bf16"))) if _like_peer(row) else None
        lines.append(
            [
                f"{row['model']} {row['recipe']}{' tuned' * row.get('tuned', False)}",
                row["kv"],
                row["test"],
                f"{speed:.1f}",
                bound,
                ratio(speed, peer),
            ]
        )
    text = table(["model", "kv", "test", "t/s", "of read", "vs PyTorch"], lines)
    for row in rows:
        if row.get("fallbacks"):
            text.append(f"{row['key']}: fallback for {', '.join(row['fallbacks'])}")
    loads = [f"{row['key'].removesuffix(': load')} {row['seconds']:.1f}" for row in rows if "weight_bytes" in row]
    return [*text, f"seconds to load: {', '.join(loads)}"]


def _peers(rows: Sequence[Record], report: Report) -> list[str]:
    read = read_bandwidth(report)
    ours: dict[tuple[str, str], float] = {}
    for row in _of(report, "models"):
        if _like_peer(row) and row["recipe"] in LIKE:
            ours[row["model"], LIKE[row["recipe"]]] = row["tokens_per_second"]
    lines: list[list[str]] = []
    for row in rows:
        speed = row["tokens_per_second"]
        mine = ours.get((row["model"], row["recipe"]))
        compared = ["", ""] if mine is None else [f"{mine:.1f}", ratio(mine, speed)]
        lines.append([row["key"], f"{speed:.1f}", share(speed * row["bytes_per_token"], read), *compared])
    return table(["peer, 1024 tokens in", "t/s", "of read", "qrun t/s", "qrun is"], lines)


def _profile(rows: Sequence[Record], report: Report) -> list[str]:
    lines: list[str] = []
    for row in rows:
        kernels = row["kernels"]
        total = sum(kernel["us"] for kernel in kernels)
        some = [
            [k["kernel"][:70], f"{k['launches']:.0f}", f"{k['us']:.1f}", share(k["us"], total)] for k in kernels[:12]
        ]
        lines += ["", *table([f"{row['model']} wint4", "launches", "us a token", ""], some)]
    return lines[1:]


def _of(report: Report, section: str) -> list[Record]:
    return [row for row in report["rows"] if row["section"] == section and "tokens_per_second" in row]


def _like_peer(row: Record) -> bool:
    """Whether a row is what the peers do: decoding near the start, with the cache in BF16."""
    return row.get("measures") == "tg" and row.get("kv") == "bf16" and row["test"].endswith("d1024")


_TEXTS: Final[Mapping[str, Callable[[Sequence[Record], Report], list[str]]]] = {
    "machine": _machine,
    "tests": _tests,
    "kernels": _kernels,
    "models": _models,
    "peers": _peers,
    "profile": _profile,
}
