"""The peak of this process's resident memory, as the operating system counts it. It knows nothing of models."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak() -> int:
    """The most bytes that were resident at once since the process began or since `reset_peak`."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> None:
    """Start counting again from now. Where the system has no such thing, the peak stays that of the whole process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return
