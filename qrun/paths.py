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


def config_dir() -> Path:
    """What a user writes by hand."""
    return platformdirs.user_config_path("qrun", appauthor=False)


def config_file() -> Path | None:
    """The settings of the command line; ``QRUN_CONFIG`` names another file, or none at all when it is empty."""
    override = os.environ.get("QRUN_CONFIG")
    if override is None:
        return config_dir() / "config.toml"
    return Path(override).expanduser() if override else None
