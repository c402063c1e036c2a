"""Where qrun keeps its own files: the platform's user directories; ``QRUN_CACHE_DIR`` overrides the cache's."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Derived files that can be made again, such as quantized weights."""
    override = os.environ.get("QRUN_CACHE_DIR")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("qrun", appauthor=False)


def state_dir() -> Path:
    """What a user would miss but need not carry along, such as the history of typed lines."""
    return platformdirs.user_state_path("qrun", appauthor=False)
