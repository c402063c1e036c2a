"""A file that one process holds at a time, until it lets go or ends. It knows not what the file stands for."""

import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take(path: Path) -> int | None:
    """A handle on the file, which is made, for `let_go`. None: another process has it.

    Raises:
        OSError: the file cannot be made, or files cannot be locked there.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(handle)
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        except (BlockingIOError, PermissionError):  # as systems say that it is locked
            os.close(handle)
            return None
        except FileNotFoundError:  # its last owner has just removed it
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def let_go(path: Path, handle: int) -> None:
    """Remove the file, and let others have its name."""
    if sys.platform == "win32":  # where no open file can be removed
        os.close(handle)
        with suppress(OSError):  # another has it already
            path.unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)
        os.close(handle)
