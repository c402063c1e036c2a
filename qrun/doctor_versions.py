"""Installed packages against what qrun and torch declare, and those that cannot live together. Imports none of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement

from qrun.doctor_check import Check, Status

OURS: Final = "qrun-llm"
TRITONS: Final = re.compile(r"(pytorch-)?triton(-xpu|-rocm|-windows|-ascend|-cpu)?|pytorch-triton(-xpu|-rocm)?")
"""Packages that all write the folder `triton`."""
NAMED: Final = ("torch", "numpy", "numba", "llvmlite", "huggingface-hub", "tokenizers", "safetensors")
"""Packages whose versions explain most; with Triton's and Intel's they are listed."""
IPEX: Final = "intel-extension-for-pytorch"
WHEELS: Final = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Package:
    """A distribution: every version of it on the path, the one that counts first, and what that requires."""

    versions: tuple[str, ...]
    requires: tuple[str, ...] = ()


def installed() -> dict[str, Package]:
    """Every distribution on the path by its normalised name."""
    found: dict[str, Package] = {}
    for one in distributions():
        name = _normal(one.metadata["Name"] or "")
        known = found.get(name)
        if known is None:
            found[name] = Package((one.version,), tuple(one.requires or ()))
        elif one.version not in known.versions:
            found[name] = Package((*known.versions, one.version), known.requires)
    return found


def torch_version(packages: Mapping[str, Package]) -> str | None:
    """Of torch, with its build as in ``2.13.0+xpu``, without importing it."""
    return packages["torch"].versions[0] if "torch" in packages else None


def versions(packages: Mapping[str, Package]) -> Iterator[Check]:
    """What is missing, too old, too new, there twice, or in another's place."""
    yield _declared(packages, OURS, "failure")
    if "torch" in packages:
        yield _declared(packages, "torch", "warning")
    listed = [
        name for name in sorted(packages) if name in NAMED or TRITONS.fullmatch(name) or name.startswith("intel-")
    ]
    yield _check("packages", "ok", ", ".join(f"{name} {packages[name].versions[0]}" for name in listed))
    yield from _twice(packages)
    yield from _tritons(packages)
    yield from _ipex(packages)
    if "qrun" in packages:
        yield _check(
            "qrun", "failure", f"the package qrun {packages['qrun'].versions[0]} is another project of the same name",
            f"pip uninstall qrun, then pip install --force-reinstall --no-deps {OURS}",
        )  # fmt: skip


def _check(name: str, status: Status, detail: str, fix: str = "") -> Check:
    return Check(section="versions", name=name, status=status, detail=detail, fix=fix)


def _declared(packages: Mapping[str, Package], owner: str, status: Status) -> Check:
    """The requirements of one package, those of its extras left out."""
    if owner not in packages:
        return _check(owner, "note", f"{owner} is not installed as a package: its requirements are not known")
    wanted = list(_requirements(packages[owner].requires))
    wrong: dict[Requirement, str] = {}
    for need in wanted:
        have = packages.get(_normal(need.name))
        if have is None:
            wrong[need] = f"{need.name} is missing"
        elif not need.specifier.contains(have.versions[0], prereleases=True):
            wrong[need] = f"{need.name} is {have.versions[0]}, {need.specifier} is needed"
    version = packages[owner].versions[0]
    if wrong:
        names = " ".join(f"'{need.name}{need.specifier}'" for need in wrong)
        return _check(owner, status, f"{version}: {'; '.join(wrong.values())}", f"pip install {names}")
    return _check(owner, "ok", f"{version}, all {len(wanted)} packages that it requires are there")


def _requirements(lines: Sequence[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            need = Requirement(line)
        except InvalidRequirement:  # whoever built that package
            continue
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield need


def _twice(packages: Mapping[str, Package]) -> Iterator[Check]:
    """Of two versions on the path the first one wins, and its files may be mixed with the other's."""
    needed = {_normal(need.name) for need in _requirements(packages.get(OURS, Package(())).requires)} | {"triton"}
    for name in sorted(needed & packages.keys()):
        if len(packages[name].versions) > 1:
            yield _check(
                name, "warning", f"installed more than once: {', '.join(packages[name].versions)}",
                f"pip uninstall {name} until none is left, then pip install {name}",
            )  # fmt: skip


def _tritons(packages: Mapping[str, Package]) -> Iterator[Check]:
    names = sorted(name for name in packages if TRITONS.fullmatch(name))
    build = torch_version(packages) or ""
    right = "triton-xpu" if "+xpu" in build else "triton"
    if len(names) > 1:
        detail = f"{' and '.join(names)} are installed: they overwrite each other's files"
    elif names == ["triton"] and right == "triton-xpu":
        detail = f"triton is installed beside torch {build}, whose own is triton-xpu"
    else:
        return
    index = f" --index-url {WHEELS}/xpu" if right == "triton-xpu" else ""
    again = f"pip uninstall -y {' '.join(names)}, then the one of this torch: pip install {right}{index}"
    yield _check("triton", "failure", detail, again)


def _ipex(packages: Mapping[str, Package]) -> Iterator[Check]:
    """Binary modules: one goes with torch of the same minor version alone, and the last was made for 2.8."""
    if IPEX not in packages:
        return
    mine, build = packages[IPEX].versions[0], torch_version(packages) or "none"
    pair = ".".join(mine.split(".")[:2])
    if not build.startswith(f"{pair}."):
        yield _check(
            "IPEX", "warning", f"{IPEX} {mine} goes with torch {pair} alone, not with {build}; "
            "it is discontinued, and torch itself knows Intel GPUs now", f"pip uninstall {IPEX}",
        )  # fmt: skip
    else:
        yield _check("IPEX", "note", f"{IPEX} {mine}: discontinued; torch itself knows Intel GPUs now")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
