"""From what a user calls a model to a directory on this machine: a path, the embedded model, a short name, or org/name.

The only file that imports huggingface_hub, and only when the hub is really asked, so that its environment variables can
still be set before. Weights stay in the Hugging Face cache. Every failure is one line that says what to do.
"""

import contextlib
import errno
import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

from qrun.checkpoint import INDEX, has_all_weights, read_config
from qrun.errors import CheckpointError, ModelNotFoundError
from qrun.memory import DEFAULT_CONTEXT, available, check_fits, human
from qrun.models import describe
from qrun.names import ELSE, Name, local_path, resolve
from qrun.readers import quantization
from qrun.recipe import Recipe

EMBEDDED: Final = "spark"
WANTED: Final = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template*", "*.safetensors", INDEX,
)  # fmt: skip
"""Files to fetch, all at the top of a repository; `consolidated*` repeats the weights in another layout."""
LISTING: Final = "the list of files"
RESERVE_BYTES: Final = 1 << 30
"""Disk space that stays free."""
_COMMIT: Final = re.compile("[0-9a-f]{40}")

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how many bytes are done, and of how many."""


@dataclass(frozen=True)
class Resolved:
    """Where the model is, what to call it, and what the user should know of how it was chosen (may be empty)."""

    path: Path
    label: str
    note: str = ""


class HubClient(Protocol):
    """What is asked of the hub. Failures are `ModelNotFoundError` with a complete message."""

    def file(
        self, repo: str, name: str, revision: str, *, offline: bool = False, update: Callable[[int], None] | None = None
    ) -> Path:
        """The file in the local cache, fetched unless ``offline``; ``update`` gets the bytes as they arrive.

        Its parent directory is the snapshot, named by its commit.
        """
        ...

    def sizes(self, repo: str, revision: str) -> Mapping[str, int]:
        """Every file of the repository and its bytes."""
        ...

    def header(self, repo: str, name: str, revision: str) -> Mapping[str, str]:
        """The tensors of a safetensors file and their types as it writes them, without fetching the rest of it."""
        ...

    def cache_dir(self) -> Path:
        """Where files are kept."""
        ...


def fetch(
    name: str | os.PathLike[str] | None = None,
    *,
    recipe: Recipe,
    context: int = DEFAULT_CONTEXT,
    offline: bool = False,
    memory: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    client: HubClient | None = None,
) -> Resolved:
    """The directory of the model that ``name`` stands for, downloaded first if need be and if it fits.

    ``name`` is None or ``spark`` for the embedded model, a directory, a short name such as ``ernie`` or ``qwen3:4b``,
    or ``org/name[@revision]``. ``context`` counts positions, -1 all the model has. ``memory`` is what ``device`` has
    free, in bytes; None asks it.

    Raises `ModelNotFoundError` if there is no such model here or on the hub, `DoesNotFitError` before any weights are
    downloaded, and `CheckpointError` if the repository is of no use.
    """
    if name is None or name == EMBEDDED:
        return Resolved(Path(__file__).parent / "spark", EMBEDDED)
    text = os.fspath(name)
    here = local_path(text)
    if here is not None:
        return Resolved(here, here.resolve().name)
    free = available(device) if memory is None else memory
    client = client or HuggingFace()
    names = resolve(text, recipe, context=context, memory=free, device=device)
    if offline or is_offline():
        return _first_cached([_Fetch(client, name, progress or _silent) for name in names])
    path, note = _Fetch(client, names[0], progress or _silent).download(recipe, context, free, device)
    return Resolved(path, names[0].label, "; ".join(filter(None, (names[0].note, note))))


def _first_cached(choices: Sequence["_Fetch"]) -> Resolved:
    """The first that is wholly in the cache. Raises what is wrong with the first of all if none is."""
    errors: list[ModelNotFoundError] = []
    for choice in choices:
        try:
            note = f"{choice.name.note} and is in the hub cache" if choice.name.note and errors else choice.name.note
            return Resolved(choice.cached(), choice.name.label, note)
        except ModelNotFoundError as error:
            errors.append(error)
    raise errors[0]


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def is_offline() -> bool:
    """Whether the environment says not to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class _Fetch:
    """One repository at one revision."""

    client: HubClient
    name: Name
    progress: Progress

    @property
    def repo(self) -> str:
        return self.name.repo

    @property
    def revision(self) -> str:
        return self.name.revision or "main"

    def cached(self) -> Path:
        """The snapshot in the local cache. Raises `ModelNotFoundError` if it is not there, or not all of it."""
        path = self.client.file(self.repo, "config.json", self.revision, offline=True).parent
        if not has_all_weights(path):
            raise ModelNotFoundError(
                f"{self.repo} is only partly in the hub cache: start once without --offline to fetch the rest, {ELSE}"
            )
        return path

    def download(self, recipe: Recipe, context: int, free: int, device: str = "cpu") -> tuple[Path, str]:
        """The snapshot and a note; nothing large is fetched before the config says that it fits.

        Where the hub cannot be asked, the cached copy serves if it is whole.
        """
        try:
            if _COMMIT.fullmatch(self.revision):
                with contextlib.suppress(ModelNotFoundError):
                    return self.cached(), ""
            sizes = {
                name: size for name, size in self.client.sizes(self.repo, self.revision).items() if _is_wanted(name)
            }
            if "config.json" not in sizes:
                raise CheckpointError(f"{self.repo} has no config.json: choose a transformers-style repository, {ELSE}")
            path = self.client.file(self.repo, "config.json", self.revision).parent
        except ModelNotFoundError as error:
            with contextlib.suppress(ModelNotFoundError):
                return self.cached(), f"{str(error).removesuffix(f', {ELSE}')}; the cached copy is used"
            raise
        config = describe(read_config(path))
        room = config.positions if context < 1 else min(context, config.positions)
        files = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        stays = files if recipe.own and quantization(read_config(path)) else None
        check_fits(config, recipe, context=room, memory=free, name=self.repo, files=stays, device=device)
        if not any(name.endswith(".safetensors") for name in sizes):
            raise CheckpointError(f"{self.repo} has no safetensors weights: choose a repository that has, {ELSE}")
        self._fetch_all({name: size for name, size in sizes.items() if not (path / name).exists()}, path.name)
        return path, ""

    def _fetch_all(self, missing: Mapping[str, int], commit: str) -> None:
        total = sum(missing.values())
        self._check_disk(total)
        done = finished = 0

        def update(count: int) -> None:
            nonlocal done
            done = min(done + count, total)
            self.progress(f"fetching {self.repo}", done, total)

        for name in sorted(missing, key=lambda name: (missing[name], name)):  # small ones first: they fail early
            self.client.file(self.repo, name, commit, update=update)
            finished += missing[name]
            update(finished - done)  # a file that the cache had under another name arrives without a byte

    def _check_disk(self, wanted: int) -> None:
        place = self.client.cache_dir()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if wanted and free < wanted + RESERVE_BYTES:
            raise ModelNotFoundError(
                f"{self.repo} is {human(wanted)} to download, {human(free)} are free in {place}: make room or set "
                f"HF_HOME to a larger disk, {ELSE}"
            )


def _is_wanted(name: str) -> bool:
    return (
        "/" not in name
        and not name.startswith("consolidated")
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in WANTED)
    )


class HuggingFace:
    """The hub through huggingface_hub, its many exceptions brought to one. Give ``endpoint`` and ``cache`` in tests."""

    def __init__(self, *, endpoint: str | None = None, cache: Path | None = None) -> None:
        self._endpoint = endpoint
        self._cache = cache

    def file(
        self, repo: str, name: str, revision: str, *, offline: bool = False, update: Callable[[int], None] | None = None
    ) -> Path:
        """See `HubClient.file`."""
        with _translated(repo, revision, name, offline=offline):
            from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

            path = hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=self._cache,
                endpoint=self._endpoint,
                local_files_only=offline,
                tqdm_class=cast(Any, _bar_class(update or (lambda count: None))),
            )
            return Path(path)

    def sizes(self, repo: str, revision: str) -> Mapping[str, int]:
        """See `HubClient.sizes`."""
        with _translated(repo, revision, LISTING, offline=False):
            from huggingface_hub import HfApi

            info = HfApi(endpoint=self._endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=10)
            return {file.rfilename: file.size or 0 for file in info.siblings or []}

    def header(self, repo: str, name: str, revision: str) -> Mapping[str, str]:
        """See `HubClient.header`."""
        with _translated(repo, revision, f"the header of {name}", offline=False):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=self._endpoint)
            found = api.parse_safetensors_file_metadata(repo, name, revision=revision)
            return {tensor: info.dtype for tensor, info in found.tensors.items()}

    def cache_dir(self) -> Path:
        """See `HubClient.cache_dir`."""
        if self._cache is not None:
            return self._cache
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)


def _bar_class(update: Callable[[int], None]) -> type:
    """A stand-in for a tqdm class that draws nothing and passes on the bytes."""

    class Bar:
        total: int | None = None
        n: int = 0

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *args: object) -> None: ...

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            update(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which `update` counts again when they reach the file."""

        def set_postfix_str(self, *args: object, **kwargs: object) -> None: ...

        def set_transfer_postfix_str(self, *args: object, **kwargs: object) -> None: ...

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    return Bar


@contextlib.contextmanager
def _translated(repo: str, revision: str, what: str, *, offline: bool) -> Generator[None]:
    """Turn whatever goes wrong with the hub into one line. Its transport's own errors come through it bare."""
    try:
        yield
    except Exception as error:
        raise ModelNotFoundError(f"{explain(error, repo, revision, what, offline=offline)}, {ELSE}") from error


def explain(error: Exception, repo: str, revision: str, what: str, *, offline: bool) -> str:
    from huggingface_hub import errors

    chain = list(_chain(error))
    if any(getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e) for e in chain):
        return f"the disk is full while fetching {repo}: make room or set HF_HOME to a larger disk"
    for e in chain:
        if isinstance(e, errors.GatedRepoError):
            return f"{repo} is gated: accept its licence on huggingface.co/{repo}, set HF_TOKEN, and try again"
        if isinstance(e, errors.RevisionNotFoundError):
            return f"{repo} has no revision {revision!r}: check it on the hub"
        if isinstance(e, errors.RepositoryNotFoundError):
            return f"the hub has no {repo}, or it is private: check the name, and set HF_TOKEN if it is yours"
        if isinstance(e, errors.RemoteEntryNotFoundError):
            return f"{repo} has no {what}: it is not a transformers-style checkpoint; choose another repository"
        if isinstance(e, errors.HfHubHTTPError) and (code := getattr(e.response, "status_code", 0)) >= 400:
            hint = "set HF_TOKEN" if code in (401, 403) else "try again later"
            return f"the hub answered {code} for {repo} ({what}): {hint}"
    if offline and isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo} is not in the hub cache: start once without --offline"
    transport = errors.HfHubHTTPError.__bases__[0]  # the HTTP library's base; which library depends on the version
    if isinstance(error, (transport, ConnectionError, errors.LocalEntryNotFoundError)):
        if what == LISTING:
            return f"the hub cannot be reached for {repo} ({_first_line(error)}): check the network or HF_ENDPOINT"
        return f"the connection broke while fetching {what} of {repo}: start again; finished files are kept"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a valid repository name: write org/name"
    if isinstance(error, PermissionError):
        return f"cannot write {error.filename}: set HF_HOME to a directory of yours"
    return f"fetching {what} of {repo} failed ({_first_line(error)}): start again; finished files are kept"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
