"""What was found out about a device, kept as JSON between starts. It knows nothing of what is kept."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start has found; nothing where the file is missing or not as it was written."""
    try:
        found = json.loads(file.read_bytes())
        return {key: dict(value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write(file: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Beside, then renamed. A disk that is full or read-only costs the next start its time, nothing else."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(file)
