"""Everything that only a GPU can say, in one command: device tests, kernels, models and peers, in about nine minutes.

    python -m tools.gpu_check [--minutes 9] [--out FILE.json] [--quick] [--only tests,kernels,models,peers,profile]

Runs from the source tree. Every section has a process, a share of the time and a log of its own; a failing one stops no
other, and what there is no time for is listed. Writes one JSON file after each section and prints tables with ratios.
Ends with code 1 where there is no GPU, a test failed or something could not be measured.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tools.gpu_check_tree import ROOT, link, use, versions

SHARES: Final = {"machine": 4, "tests": 18, "kernels": 24, "models": 38, "peers": 20, "profile": 8}
"""The sections in their order, and how the time is divided; what one leaves over goes to those behind it."""
WORK: Final = {
    "machine": ("tools.gpu_check_machine", "measure_machine"),
    "kernels": ("tools.gpu_check_kernels", "measure_kernels"),
    "models": ("tools.gpu_check_models", "measure_models"),
    "peers": ("tools.gpu_check_machine", "measure_peers"),
    "profile": ("tools.gpu_check_models", "profile_models"),
}
NO_GPU_NEEDED: Final = ("test_gpu_aot.py", "test_gpu_check.py")
GRACE: Final = 10.0
"""Seconds a section may go on past its time, to finish what it is at."""

Record = dict[str, Any]


@dataclass
class Report:
    """All that is known so far. ``sections``: seconds used and given, and how the processes ended."""

    date: str
    arguments: list[str]
    versions: dict[str, str]
    missing: list[str]
    sections: dict[str, Record] = field(default_factory=dict[str, Record])
    rows: list[Record] = field(default_factory=list[Record])
    errors: list[Record] = field(default_factory=list[Record])
    skipped: list[Record] = field(default_factory=list[Record])

    def take(self, records: Sequence[Record]) -> None:
        """Sort a section's records; what was begun and never ended took its process with it."""
        ended = {record["key"] for record in records if record["kind"] not in ("begun", "skipped")}
        for record in records:
            if record["kind"] == "begun" and record["key"] not in ended:
                self.errors.append(record | {"kind": "error", "error": "its process ended, or was out of time"})
            elif record["kind"] != "begun":
                {"row": self.rows, "error": self.errors, "skipped": self.skipped}[record["kind"]].append(record)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self), indent=1, default=str) + "\n", encoding="utf-8")


def run_section(section: str, limit: float, folder: Path, *, quick: bool) -> tuple[list[Record], Record]:
    """A section's records and how it went, from processes that are started anew when one loses the device."""
    from tools.gpu_check_job import BROKEN, read_records

    path, log = folder / f"{section}.jsonl", folder / f"{section}.log"
    begun = time.monotonic()
    codes: list[int | str] = []
    while True:
        left = limit - (time.monotonic() - begun)
        before = len(read_records(path))
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.gpu_check import child; child(sys.argv[1:])"
        command = [sys.executable, "-c", start, section, str(path), f"{left:.1f}", "quick" if quick else "full"]
        codes.append(run_process(command, left + GRACE, log, cwd=ROOT))
        stuck = len(read_records(path)) == before
        if codes[-1] in (0, "out of time") or stuck or limit - (time.monotonic() - begun) < 15 or len(codes) > 6:
            break
    went: Record = {"seconds": round(time.monotonic() - begun, 1), "given": round(limit, 1), "ended": codes}
    if codes != [0]:
        went["log"] = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    records = read_records(path)
    if codes[-1] not in (0, "out of time", BROKEN):
        last = (went["log"].splitlines() or [""])[-1]
        records.append(_record(section, "error", "the process", error=f"ended with {codes[-1]}: {last}"))
    return records, went


def run_process(command: list[str], limit: float, log: Path, *, cwd: Path, **environment: str) -> int | str:
    """The exit code of a process whose output goes to a file; after ``limit`` seconds it and its children are ended."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=cwd, env=os.environ | environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def child(arguments: Sequence[str]) -> None:
    """The inside of a section's process."""
    section, path, limit, extent = arguments
    use()
    job_module = import_module("tools.gpu_check_job")
    job = job_module.Job(section, Path(path), float(limit), extent == "quick")
    module, name = WORK[section]
    try:
        getattr(import_module(module), name)(job)
    except job_module.BrokenDeviceError:
        sys.stdout.flush()
        os._exit(job_module.BROKEN)  # a broken context hangs an orderly exit


def run_tests(limit: float, folder: Path) -> tuple[list[Record], Record]:
    """The GPU kernels' tests, on the device."""
    tests = ROOT / "tests"
    found = sorted([*tests.glob("test_gpu_*.py"), tests / "test_cuda_backend.py", tests / "test_cuda_models.py"])
    files = [str(path) for path in found if path.name not in NO_GPU_NEEDED]
    begun = time.monotonic()
    if find_spec("pytest") is None:
        return [_record("tests", "skipped", "pytest", why="pytest is not installed")], {}
    links, log = folder / "links", folder / "tests.log"
    links.mkdir()
    link(links)
    # Warnings of another torch than the suite is pinned to are no failures here.
    options = [
        "-q",
        "--tb=short",
        "-rfE",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    if find_spec("xdist") is not None:
        options += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time goes into compiling
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(ROOT), *files]
    code = run_process(command, limit, log, cwd=links, PYTHONPATH=str(links))
    text = log.read_text(encoding="utf-8", errors="replace")
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", text[-2000:])}
    records = [_record("tests", "row", "pytest", ended=code, **counts)]
    for line in text.splitlines():
        if match := re.match(r"(FAILED|ERROR) (\S+)(?: - (.*))?$", line):
            records.append(_record("tests", "error", match[2].split("tests/")[-1], error=match[3] or match[1].lower()))
    if code not in (0, 1):
        records.append(_record("tests", "error", "pytest", error=f"ended with {code}"))
    went: Record = {"seconds": round(time.monotonic() - begun, 1), "given": round(limit, 1), "ended": [code]}
    if code != 0:
        went["log"] = text[-12000:]
    return records, went


def _record(section: str, kind: str, key: str, **values: Any) -> Record:
    return {"section": section, "kind": kind, "key": key, **values}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="only what matters most of each section")
    parser.add_argument("--only", default=",".join(list(SHARES)[1:]), metavar="SECTIONS", help="comma-separated")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    wanted = set(options.only.split(","))
    if not wanted < set(SHARES):
        parser.error(f"--only {options.only}: give some of {','.join(list(SHARES)[1:])}")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: give more than 0")
    found, missing = versions()
    if problem := no_gpu():
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 1
    report = Report(datetime.now(UTC).isoformat(timespec="seconds"), list(arguments or sys.argv[1:]), found, missing)
    if missing:
        print("not installed here:", ", ".join(missing))
    use()
    summary = import_module("tools.gpu_check_summary")
    sections = [name for name in SHARES if name == "machine" or name in wanted]
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        for i, section in enumerate(sections):
            left = 60 * options.minutes - (time.monotonic() - begun) - GRACE
            limit = left * SHARES[section] / sum(SHARES[later] for later in sections[i:])
            if section == "machine":
                limit = max(limit, min(left, 20.0))  # the others are measured against it
            if limit < 5:
                report.skipped.append(_record(section, "skipped", section, why="no time left"))
                continue
            if section == "tests":
                records, went = run_tests(limit, Path(name))
            else:
                records, went = run_section(section, limit, Path(name), quick=options.quick)
            report.take(records)
            report.sections[section] = went
            report.save(options.out)
            print(summary.section_text(section, vars(report)), flush=True)
    print(summary.ending(vars(report), time.monotonic() - begun, options.out))
    return 1 if report.errors or any(went.get("ended") != [0] for went in report.sections.values()) else 0


def no_gpu() -> str | None:
    """Why nothing can be measured here, or none."""
    if find_spec("torch") is None:
        return "torch is not installed"
    torch: Any = import_module("torch")
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees no CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed, and the kernels are written in it"
    return None


if __name__ == "__main__":
    sys.exit(main())
