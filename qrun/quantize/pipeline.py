"""A checkpoint in, a quantized directory out, layer by layer: each is read, rounded, written and let go.

Knows how the parts of a directory belong together; how a weight is rounded, stored or resumed is its neighbours'.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.checkpoint import Checkpoint
from qrun.errors import QrunError, UsageError
from qrun.formats import Format, PlainFormat
from qrun.free import release
from qrun.kernels import reference
from qrun.loader import check, is_tied
from qrun.memory import human
from qrun.models import describe
from qrun.models.config import ModelConfig
from qrun.models.plan import layer as layer_plan
from qrun.models.plan import plan as weights_of
from qrun.quantize import export
from qrun.quantize.calibration import Calibration
from qrun.quantize.gptq import Hessian
from qrun.quantize.journal import Journal, partial
from qrun.quantize.layer import LayerPass, Streams
from qrun.quantize.plan import Plan
from qrun.quantize.rounding import Method, Rounded, Rounder, written_format
from qrun.tensorfile import TensorFile

VERSION: Final = 1
"""Raise when the same settings give other bytes; an older unfinished directory is then not gone on with."""
REPORT: Final = "quantization.json"
_COPIED: Final = (
    "tokenizer*", "*.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "generation_config.json", "heldout.txt", "LICENSE*",
)  # fmt: skip
_ROWS: Final = 256  # positions whose distributions are compared at a time
_VOCAB: Final = 16384  # rows of the head that are expanded at a time

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to round. ``folds``: scale inputs too (AWQ, SmoothQuant); ``head``: quantize an untied head as planned."""

    method: Method
    folds: bool
    head: bool = False


def quantize(
    source: Path, out: Path, plan: Plan, settings: Settings, *, calibration: Calibration | None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``source`` as ``plan`` says into a new directory ``out``; returns the report that lies in it.

    Without calibration every weight is rounded by itself. An interrupted run leaves OUT.partial, and the same call goes
    on behind its last finished layer.

    Raises UsageError for what cannot be written or resumed, CheckpointError for a damaged checkpoint.
    """
    return _Run(source, plan, settings, calibration, progress or (lambda what, done, total: None)).into(out)


class _Run:
    def __init__(
        self, source: Path, plan: Plan, settings: Settings, calibration: Calibration | None, say: Progress
    ) -> None:
        self.checkpoint = Checkpoint.open(source)
        self.config: ModelConfig = describe(self.checkpoint.config)
        self.tied = is_tied(self.config, self.checkpoint)
        check(self.config, self.checkpoint, list(weights_of(self.config, tied=self.tied)), tied=self.tied)
        self.plan = plan
        self.settings = settings
        self.calibration = calibration
        self.say = say
        self.dtype = self._dtype()
        self.formats = self._formats()
        export.check(self.formats, plan.activations)
        if all(isinstance(form, PlainFormat) for form in self.formats.values()):
            raise UsageError("nothing would be quantized: give a precision with --quant, as wint4, or a --plan")
        self.rounder = Rounder(self.formats, settings.method, self.dtype)
        self.kv_fp8 = plan.k == plan.v == "fp8"
        if self.kv_fp8 and calibration is None:
            raise UsageError("an fp8 cache has fixed scales here, which need calibration: leave --method rtn out")

    def _dtype(self) -> torch.dtype:
        """Of scales: BF16 beside BF16, else float32, which holds every scale."""
        kind = self.checkpoint.dtype("model.embed_tokens.weight")
        return kind if kind == torch.bfloat16 else torch.float32

    def _formats(self) -> dict[str, Format]:
        """The format of every linear module, in the order of use; the head too, if it is one of its own."""
        found: dict[str, Format] = {}
        for weight in weights_of(self.config, tied=self.tied):
            if weight.role == "kept" or weight.name == "embed":
                continue
            head = weight.name == "lm_head"
            moe = self.config.moe if weight.role == "experts" else None
            for part in weight.parts:
                for source in part:
                    module = source.name.removesuffix(".weight")
                    scheme = self.plan.schemes[module]
                    plain = scheme.type in ("bf16", "fp32") or (head and not self.settings.head)
                    # transformers makes one tensor of all experts' weights, from one scheme.
                    columns = source.shape[1] if moe is None else math.gcd(self.config.hidden, moe.width)
                    found[module] = PlainFormat() if plain else written_format(scheme, columns)
        return found

    def into(self, out: Path) -> dict[str, Any]:
        layers = self.config.layers
        described = {
            "version": VERSION,
            "model": self.checkpoint.identity,
            "formats": {module: str(form) for module, form in self.formats.items()},
            "activations": self.plan.activations,
            "kv": self.plan.kv,
            "method": dataclasses.asdict(self.settings),
            "calibration": None if self.calibration is None else [self.calibration.digest, self.calibration.train],
        }
        self._check_room(out)
        with Journal.open(out, described) as journal:
            streams = self._streams(journal)
            for i in range(len(journal.layers), layers):
                self.say(f"layer {i + 1} of {layers}", i, layers)
                report = self._layer(journal, i, streams)
                journal.finish(report, {} if streams is None else _state(streams))
                release()
            self.say("head and embedding", layers, layers)
            with journal.shard(self._shard(layers), 8) as writer:
                head, report = self._ends(streams, writer.add)
            found = self._report(journal, streams, head, report)
            self._describe(journal)
            journal.text(REPORT, json.dumps(found, indent=1) + "\n")
            journal.complete(out)
        return found

    def _check_room(self, out: Path) -> None:
        """Raise QrunError where the disk is known to have too little room."""
        need = 0.0
        for name in self.checkpoint.names():
            form, shape = self.formats.get(name.removesuffix(".weight"), PlainFormat()), self.checkpoint.shape(name)
            plain = isinstance(form, PlainFormat)
            need += self.checkpoint.nbytes(name) if plain else form.bits_per_weight(shape) * math.prod(shape) / 8
        if self.calibration is not None:  # the inputs of two layers, of two streams
            need += 16 * self.calibration.ids.numel() * self.config.hidden
        place = next(each for each in (out, *out.absolute().parents) if each.exists())
        free = shutil.disk_usage(place).free
        if need > free and not partial(out).exists():
            raise QrunError(f"{out} needs {human(round(need))} while it is made, {human(free)} are free: make room")

    def _shard(self, i: int) -> str:
        return f"model-{i + 1:05d}-of-{self.config.layers + 1:05d}.safetensors"

    def _streams(self, journal: Journal) -> Streams | None:
        """The inputs of the first layer that is not finished."""
        if self.calibration is None:
            return None
        held = journal.state()
        if held is not None:
            return Streams(held["reference"], held["current"], self.calibration.train)
        self.say("embedding the calibration text", 0, 0)
        table = self.checkpoint.weight("model.embed_tokens.weight", (self.config.vocab, self.config.hidden))
        x = F.embedding(self.calibration.ids, table).float()
        streams = Streams(x, x.clone(), self.calibration.train)
        journal.begin(_state(streams))
        return streams

    def _layer(self, journal: Journal, i: int, streams: Streams | None) -> dict[str, Any]:
        sources = [source for weight in layer_plan(self.config, i) for part in weight.parts for source in part]
        done = 0
        with journal.shard(self._shard(i), 4 * len(sources) + 2) as writer:

            def keep(module: str, rounded: Rounded) -> None:
                nonlocal done
                done += 1
                if done % 16 == 0:
                    self.say(f"layer {i + 1} of {self.config.layers}, {done} weights", i, self.config.layers)
                self._module(writer.add, module, rounded)

            layer = LayerPass(
                self.checkpoint, self.config, i, rounder=self.rounder, activations=self.plan.activations,
                write=writer.add, keep=keep, folds=self.settings.folds, kv_scales=self.kv_fp8,
            )  # fmt: skip
            report = layer.without_data() if streams is None else layer.run(streams)
        return dataclasses.asdict(report)

    def _module(self, write: Callable[[str, Tensor], None], module: str, rounded: Rounded) -> None:
        if rounded.stored is None:
            name = f"{module}.weight"
            again = self.checkpoint.format(name, rounded.values.shape) is not None
            write(name, rounded.values.to(self.dtype if again else self.checkpoint.dtype(name)))
            return
        tensors = export.module_tensors(module, rounded.stored, self.plan.activations, self.dtype)
        for name, tensor in tensors.items():
            write(name, tensor)

    def _ends(
        self, streams: Streams | None, write: Callable[[str, Tensor], None]
    ) -> tuple[Rounded | None, dict[str, Any] | None]:
        """Write what lies outside the layers; the head, where it is quantized, and its report."""
        config = self.config
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.bias"):
            if name in self.checkpoint and (name != "lm_head.bias" or config.head_bias):
                write(name, self.checkpoint.read(name))
        if self.tied:
            return None, None
        w = self.checkpoint.weight("lm_head.weight", (config.vocab, config.hidden))
        if isinstance(self.formats["lm_head"], PlainFormat):
            write("lm_head.weight", w)
            return None, None
        hessian = None
        if streams is not None:
            hessian = Hessian.zeros(config.hidden)
            norm = self._norm()
            for window in streams.current[: streams.train]:
                hessian.add(reference.rms_norm(window, norm, config.eps))
        head = self.rounder.round({"lm_head": w.float()}, hessian)["lm_head"]
        self._module(write, "lm_head", head)
        return head, dataclasses.asdict(head.report)

    def _norm(self) -> Tensor:
        return self.checkpoint.weight("model.norm.weight", (self.config.hidden,)).float()

    def _report(
        self, journal: Journal, streams: Streams | None, head: Rounded | None, head_report: dict[str, Any] | None
    ) -> dict[str, Any]:
        parameters = sum(math.prod(weight.shape) for weight in weights_of(self.config, tied=self.tied))
        shards = [journal.place / self._shard(i) for i in range(self.config.layers + 1)]
        size = sum(path.stat().st_size for path in shards)
        calibration = self.calibration
        return {
            "model": self.plan.label,
            "method": self.settings.method if calibration is not None else "rtn",
            "folds": self.settings.folds,
            "activations": self.plan.activations,
            "kv": self.plan.kv,
            "bytes": size,
            "bits_per_weight": 8 * size / parameters,
            "calibration": None
            if calibration is None
            else {"text": calibration.name, "tokens": calibration.ids.numel(), "measured": self._measured()},
            "kl": None if streams is None else self._kl(streams, head),
            "head": head_report,
            "layers": journal.layers,
        }

    def _measured(self) -> int:
        assert self.calibration is not None, "only calibrated runs measure"
        return (len(self.calibration.ids) - self.calibration.train) * self.calibration.ids.shape[1]

    def _kl(self, streams: Streams, head: Rounded | None) -> float:
        """Nats a token from the reference to the quantized model, on the windows that no Hessian saw."""
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        table = self.checkpoint.weight(name, (self.config.vocab, self.config.hidden))
        bias = self.checkpoint.read("lm_head.bias").float() if self.config.head_bias else None
        norm, eps = self._norm(), self.config.eps
        pairs = [
            reference.rms_norm(stream[streams.train :].flatten(0, 1), norm, eps)
            for stream in (streams.reference, streams.current)
        ]
        total = 0.0
        for a in range(0, len(pairs[0]), _ROWS):
            self.say("measuring", a, len(pairs[0]))
            p = torch.log_softmax(_logits(pairs[0][a : a + _ROWS], table, bias), -1)
            q = torch.log_softmax(_logits(pairs[1][a : a + _ROWS], table if head is None else head.values, bias), -1)
            total += float((p.exp() * (p - q)).sum(-1).clamp_min(0).sum())
        return total / len(pairs[0])

    def _describe(self, journal: Journal) -> None:
        """config.json, the index, and what is copied."""
        config = self.config
        found = export.quantization_config(
            self.formats, self.plan.activations, kv_fp8=self.kv_fp8,
            routers=any(config.is_sparse(i) for i in range(config.layers)),
        )  # fmt: skip
        weight_map: dict[str, str] = {}
        size = 0
        for i in range(config.layers + 1):
            file = TensorFile(journal.place / self._shard(i))
            weight_map |= dict.fromkeys(file.entries, self._shard(i))
            size += sum(entry.nbytes for entry in file.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        journal.text("model.safetensors.index.json", json.dumps(index, indent=1))
        for pattern in _COPIED:
            for file in sorted(self.checkpoint.path.glob(pattern)):
                if file.is_file():
                    journal.copy(file)
        journal.text("config.json", json.dumps(dict(self.checkpoint.config) | {"quantization_config": found}, indent=1))


def _state(streams: Streams) -> Mapping[str, Tensor]:
    return {"reference": streams.reference, "current": streams.current}


def _logits(h: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """h [S, H] times the head, expanded some rows at a time."""
    pieces = [h @ table[a : a + _VOCAB].float().t() for a in range(0, len(table), _VOCAB)]
    whole = torch.cat(pieces, -1)
    return whole if bias is None else whole + bias
