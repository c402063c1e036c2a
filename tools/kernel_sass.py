"""Compiles one kernel configuration for a GPU that need not be there, and reads the machine code that came out.

It counts: registers, stack, shared memory, and the instructions of the main loop. What is too much, it does not know.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from qrun.kernels.gpu_aot import Variant

# Instructions by kind, in machine code (capitals) and in PTX.
MMA: Final = re.compile(r"([A-Z0-9]*MMA|mma|wgmma\.mma_async|tcgen05\.mma)(\..*)?")
LOAD: Final = re.compile(r"(LDG|LDGSTS|LD|UTMALDG|UBLKCP|ld\.global|cp\.async\.c[ag]|cp\.async\.bulk\.tensor)(\..*)?")
LOCAL: Final = re.compile(r"(STL|LDL)(\..*)?")
DOT: Final = re.compile(
    r"(?:tt|ttng)\.(?:dot|warp_group_dot|dot_scaled|tc_gen5_mma)\b.* : "
    r"\S*<(\d+)x(\d+)x.*? \* \S*<(\d+)x(\d+)x"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One variant on one architecture. Sizes in bytes; ``loop`` and ``ops`` are the main loop's instructions.

    ``unrolled``: passes of the kernel's own loop in one of the machine code's. ``dots``: weights that the dots of one
    pass take as left and as right operands. ``error``: why there is no code, the rest being zero then.
    """

    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    loop: int = 0
    unrolled: int = 1
    mma: int = 0
    dots: tuple[int, int] = (0, 0)
    ops: dict[str, int] = field(default_factory=dict[str, int])
    per_weight: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Instruction:
    """``op`` with its suffixes. ``target``: the label it may jump to; ``ends``: nothing runs past it."""

    op: str
    target: str | None = None
    ends: bool = False


@cache
def variants(module: str) -> tuple[Variant, ...]:
    """What a kernel module, by its import name or its file, lists to compile."""
    return tuple(load(module).variants())


@cache
def load(module: str) -> Any:
    """A module by its import name, or from a file's path."""
    if not module.endswith(".py"):
        return import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {module}")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # triton looks a kernel's module up by its name
    spec.loader.exec_module(made)
    return made


def measure(module: str, index: int, arch: int) -> Measured:
    """Compile a module's variant and read its code. A failure is a result, too."""
    variant = variants(module)[index]
    try:
        asm, shared = build(variant, arch)
        usage = _tool("cuobjdump", "-res-usage", asm["cubin"])
        code = sass(_tool("nvdisasm", "-c", asm["cubin"]))
    except Exception as error:  # whatever triton, LLVM or ptxas object to
        return Measured(name=variant.name, arch=arch, error=_reason(error))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        return Measured(name=variant.name, arch=arch, error="cuobjdump names no registers")
    loop = main_loop(*code)
    again = main_loop(*ptx(asm["ptx"]))
    unrolled = _unrolled(loop, again)
    ops = Counter(op.op.split(".")[0] for op in loop)
    per_weight: float | None = None
    if variant.weights and loop:
        per_weight = len(loop) * 32 * variant.warps / (variant.weights * unrolled)
    return Measured(
        name=variant.name,
        arch=arch,
        registers=int(found[1]),
        stack=int(found[2]),
        local=_count(code[0], LOCAL),
        shared=shared,
        loop=len(loop),
        unrolled=unrolled,
        mma=_count(loop, MMA),
        dots=dots(asm["ttgir"]),
        ops=dict(ops.most_common()),
        per_weight=per_weight,
    )


def _reason(error: BaseException) -> str:
    """The first cause of an error on one line; where the text is long, as the compiler's are, its two ends."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " … ".join(dict.fromkeys((lines[0], lines[-1])))[:400]


def build(variant: Variant, arch: int) -> tuple[dict[str, Any], int]:
    """The stages of a variant's compilation by name, and the shared memory it asks for."""
    names: list[str] = variant.kernel.arg_names
    given = {*variant.types, *variant.constants}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"the variant gives neither a type nor a value to {', '.join(missing)}")
    if unknown := sorted(given - set(names)):
        raise ValueError(f"the kernel has no argument {', '.join(unknown)}")
    aligned = {name for name, kind in variant.types.items() if kind.startswith("*")} | set(variant.multiples)
    triton: Any = import_module("triton")
    source = import_module("triton.compiler").ASTSource(
        fn=variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        # As a launch has it; without it there are no vector loads.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made = triton.compile(source, target=target, options=options)
    return made.asm, int(made.metadata.shared)


def _tool(name: str, option: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools that triton carries."""
    place = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([place, option, file.name], capture_output=True, text=True, check=True).stdout


def sass(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """nvdisasm's listing as instructions, and where its labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z]\S*)(.*);", line):
            guard, op, rest = found.groups()
            base = op.split(".")[0]
            jump = re.match(r"(.*)`\((\.L_x_\d+)\)", rest) if base in ("BRA", "JMP") else None
            # `BRA P0, label` and `BRA.DIV UR4, label` are conditional without a guard.
            sure = guard is None and not (jump and jump[1].strip())
            ends = sure and base in ("BRA", "JMP", "BRX", "EXIT", "RET", "KILL")
            code.append(Instruction(op, jump[2] if jump else None, ends))
    return code, labels


def ptx(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """PTX as instructions, and where its labels stand."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\$L\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*(@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*?);", line):
            guard, op, rest = found.groups()
            target = rest.strip() if op.split(".")[0] == "bra" else None
            code.append(Instruction(op, target, guard is None and op.split(".")[0] in ("bra", "ret", "exit", "trap")))
    return code, labels


def main_loop(code: Sequence[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The instructions of the loop that does the work, or none.

    Of the loops with tensor-core instructions (where none has any: of all), those that hold no other; of these, the
    longest.
    """
    bodies = [
        (blocks, [op for a, b in sorted(blocks) for op in code[a:b] if op.op != "NOP"])
        for blocks in natural_loops(code, labels)
    ]
    bodies = [body for body in bodies if len(body[1]) > 4]
    working = [body for body in bodies if _count(body[1], MMA)] or bodies
    inner: list[list[Instruction]] = [ops for blocks, ops in working if not any(other < blocks for other, _ in working)]
    return max(inner, key=len, default=list[Instruction]())


def natural_loops(code: Sequence[Instruction], labels: dict[str, int]) -> list[frozenset[tuple[int, int]]]:
    """Every loop as its basic blocks (first, past the last). A jump back is a loop only if its target dominates it:
    the compiler also moves rare code behind the end, which jumps back to where it came from."""
    cuts = {0, len(code), *labels.values()} | {i + 1 for i, op in enumerate(code) if op.target or op.ends}
    edges = sorted(cuts)
    blocks = list(pairwise(edges))
    number = {start: i for i, (start, _) in enumerate(blocks)}
    after: list[list[int]] = []
    for i, (_, stop) in enumerate(blocks):
        last = code[stop - 1]
        jump = number.get(labels.get(last.target or "", -1))
        straight = [] if last.ends or i + 1 == len(blocks) else [i + 1]
        after.append(straight if jump is None else [*straight, jump])
    before: list[list[int]] = [[] for _ in blocks]
    for i in _reach([0] if blocks else [], lambda i: after[i]):
        for j in after[i]:
            before[j].append(i)
    everything = (1 << len(blocks)) - 1
    dominators = [1, *[everything] * (len(blocks) - 1)]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            mine = everything
            for j in before[i]:
                mine &= dominators[j]
            mine |= 1 << i
            changed |= mine != dominators[i]
            dominators[i] = mine
    loops: dict[int, set[int]] = {}
    for head in range(len(blocks)):
        for tail in before[head]:
            if dominators[tail] >> head & 1:
                body = _reach([tail], lambda i, head=head: [] if i == head else before[i])
                loops.setdefault(head, {head}).update(body)
    return [frozenset(blocks[i] for i in body) for body in loops.values()]


def _reach(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
    seen: set[int] = set()
    stack = list(start)
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack.extend(step(i))
    return seen


def _count(code: Iterable[Instruction], kind: re.Pattern[str]) -> int:
    return sum(1 for op in code if kind.fullmatch(op.op))


def _unrolled(loop: Sequence[Instruction], source: Sequence[Instruction]) -> int:
    """How often the assembler repeated the loop's body, from its loads and tensor-core instructions before and after.

    Where the two disagree, the smaller: some tensor-core instructions become several.
    """
    ratios = [
        _count(loop, kind) // _count(source, kind)
        for kind in (MMA, LOAD)
        if _count(source, kind) and _count(loop, kind)
    ]
    return max(1, min(ratios, default=1))


def dots(ttgir: str) -> tuple[int, int]:
    """Elements of the left and of the right operands of all dots in the innermost loop that has most of them."""
    sums: dict[int, tuple[int, int]] = {}
    stack: list[tuple[int, int]] = []  # (indentation, line) of the loops around
    for number, line in enumerate(ttgir.splitlines()):
        indent = len(line) - len(line.lstrip())
        while stack and line.strip() and indent <= stack[-1][0]:
            stack.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            stack.append((indent, number))
        elif stack and (found := DOT.search(line)):
            m, k, _, n = map(int, found.groups())
            left, right = sums.get(stack[-1][1], (0, 0))
            sums[stack[-1][1]] = (left + m * k, right + k * n)
    return max(sums.values(), key=sum, default=(0, 0))
