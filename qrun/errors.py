"""Every error qrun raises on purpose, as one tree. Each carries the exit code the command line ends with.

    QrunError                  1  something failed
    ├── UsageError             2  an argument is wrong
    │   └── RecipeError        2  a precision name is wrong
    ├── ModelNotFoundError     3  no such model here or on the hub
    ├── DoesNotFitError        4  not enough memory
    ├── StrictError            5  --strict refuses a fallback
    ├── CheckpointError        1  a model file is missing, damaged or lies
    │   └── UnsupportedModelError 1  a model qrun does not know
    ├── TokenizerError         1  the tokenizer files cannot be used
    │   └── TemplateError      1  the chat template cannot be rendered
    ├── SnapshotError          1  a kept cache cannot be written, read or used here
    ├── ContextOverflowError   1  the conversation is longer than the context
    └── BackendError           1  the device cannot be used

A message is one line: what is wrong, with the name and the value, then what to do about it.
"""

from typing import ClassVar


class QrunError(Exception):
    """Base of all errors meant for the user's eyes."""

    exit_code: ClassVar[int] = 1


class UsageError(QrunError):
    """An argument is missing, out of range, or contradicts another."""

    exit_code = 2


class RecipeError(UsageError):
    """A precision name does not parse; the message lists what is possible."""


class ModelNotFoundError(QrunError):
    """The model is neither a directory here, nor in the hub cache, nor reachable on the hub."""

    exit_code = 3


class DoesNotFitError(QrunError):
    """The forecast, or an allocation, exceeds the memory at hand."""

    exit_code = 4


class StrictError(QrunError):
    """``--strict`` was given and an operation would run on a fallback."""

    exit_code = 5


class CheckpointError(QrunError):
    """A checkpoint file is missing, truncated, malformed, or disagrees with its config."""


class UnsupportedModelError(CheckpointError):
    """The architecture, or one value of its config, is not supported; named in the message."""


class TokenizerError(QrunError):
    """The tokenizer's files are missing or cannot be read."""


class TemplateError(TokenizerError):
    """The chat template is missing, fails, or does what a template may not do."""


class SnapshotError(QrunError):
    """A snapshot of the cache is damaged, cannot be written, or belongs to another model or recipe."""


class ContextOverflowError(QrunError):
    """The prompt does not fit in the context."""


class BackendError(QrunError):
    """The device does not exist, or lacks what is asked of it."""
