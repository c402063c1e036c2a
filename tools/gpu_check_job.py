"""A section's run in a process of its own: what was measured goes to a file at once, so nothing is lost with it.

A measurement that fails is a record, too, and the next one follows. Where it leaves the device unusable the process
ends with the code BROKEN; started again with the same file, it goes on behind the one that failed.
"""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

BROKEN: Final = 75

Record = dict[str, Any]


class BrokenDeviceError(Exception):
    """The device answers nothing any more, so this process is of no use."""


def read_records(path: Path) -> list[Record]:
    """What a section wrote so far; a last line cut off by the end of its process is left out."""
    records: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


@dataclass
class Job:
    """One section. ``limit``: seconds it has from now on. ``quick``: only what matters most."""

    section: str
    path: Path
    limit: float
    quick: bool = False
    device: str = "cuda"
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        before = read_records(self.path)
        self.done = {record["key"] for record in before if record["kind"] != "skipped"}
        self.succeeded = {record["key"] for record in before if record["kind"] == "row"}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.limit - (time.monotonic() - self.begun)

    def record(self, kind: str, key: str, values: Record) -> None:
        """Append a record to the file: a row, an error, or what was skipped."""
        whole = {"section": self.section, "kind": kind, "key": key}
        assert not whole.keys() & values.keys(), f"{key} would lose its section, kind or key"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole | values) + "\n")
        self.done.add(key)

    def attempt(self, key: str, work: Callable[[], Record | None], *, least: float = 2.0) -> bool:
        """Do one piece of work and record the row it returns, unless it was done before or under ``least`` seconds
        are left. Returns whether it succeeded now.

        Raises:
            BrokenDeviceError: it failed and took the device with it.
        """
        if key in self.done:
            return False
        if self.left < least:
            self.record("skipped", key, {"why": "no time left"})
            return False
        began = time.monotonic()
        # Written first: what kills the process is then not tried a second time.
        self.record("begun", key, {})
        try:
            row = work()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self.record("error", key, {"error": text, "where": where})
            if not self.usable():
                raise BrokenDeviceError(key) from error
            return False
        self.record("row", key, {"took": round(time.monotonic() - began, 2), **(row or {})})
        return True

    def usable(self) -> bool:
        """Whether the device still answers."""
        if self.device == "cpu":
            return True
        try:
            torch.cuda.synchronize()
            return bool((torch.ones(2, device=self.device) + 1).sum().item() == 4)
        except Exception:  # a broken context raises all kinds
            return False
