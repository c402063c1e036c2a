"""The CPU: each block of a model is one call into a program of Numba kernels that read the quantized weights and
cache in place."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qrun.backends.base import (
    Attend,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Feed,
    FfnWeights,
    Linear,
    MoESpec,
    MoEWeights,
)
from qrun.backends.cpu_attention import Attention
from qrun.backends.cpu_matrix import Matrix, Workspace, matrix, padded, row_of
from qrun.backends.cpu_moe import FEW, MoEFew, MoEStep, MoESweep, Router
from qrun.formats import QTensor
from qrun.kernels import reference
from qrun.kernels.cpu_pool import FIRST, HOME, Pool, Program, aligned


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CPUBackend(Backend):
    """Float32 activations between blocks; weights and cache in their formats, on `threads` threads (all cores by
    default)."""

    name = "cpu"

    def __init__(self, *, threads: int | None = None, progress: Callable[[str], None] | None = None) -> None:
        super().__init__("cpu", torch.float32, progress)
        self.threads = threads or _cores()
        torch.set_num_threads(self.threads)
        self.pool = Pool(self.threads)
        self.workspace = Workspace(self.threads)
        self._compiles = not HOME.exists()

    @property
    def description(self) -> str:
        return f"CPU, {self.threads} threads"

    def _matrix(self, weight: QTensor, bias: Tensor | None, activations: str, op: str) -> Matrix | None:
        made = matrix(weight, bias, activations, self.workspace)
        if made is not None:
            known = len(self.bindings)
            self.note(op, weight.format, made.kernel)
            if self._compiles and len(self.bindings) > known:
                self.progress(f"compiling kernels for this CPU, once: {op}, {weight.format}")
        return made

    def linear(
        self, weight: QTensor, bias: Tensor | None = None, *, activations: str = "16", op: str = "linear"
    ) -> Linear:
        mat = self._matrix(weight, bias, activations, op)
        if mat is None:
            return super().linear(weight, bias, activations=activations, op=op)
        many = self._linear_many(mat, None, 0.0)
        one = self._linear_one(mat, None, 0.0)
        return lambda x: one(x) if x.shape[0] == 1 else many(x)

    def head(
        self, norm: Tensor, eps: float, weight: QTensor, bias: Tensor | None, *, activations: str = "16"
    ) -> Linear:
        mat = self._matrix(weight, bias, activations, "lm_head")
        if mat is None:
            return super().head(norm, eps, weight, bias, activations=activations)
        norm = norm.float().contiguous()
        many = self._linear_many(mat, norm, eps)
        one = self._linear_one(mat, norm, eps)
        return lambda x: one(x) if x.shape[0] == 1 else many(x)

    def _linear_one(self, mat: Matrix, norm: Tensor | None, eps: float) -> Linear:
        program = Program(2)
        first = mat.feed(program, None, norm, eps)
        slots = mat.multiply(program, None)

        def call(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = row_of(mat.rows)
            program.words[first, FIRST] = x.data_ptr()
            slots.set(out.data_ptr())
            self.pool.run(program)
            return out

        return call

    def _linear_many(self, mat: Matrix, norm: Tensor | None, eps: float) -> Linear:
        program = Program(2)
        first, last = mat.feed_many(program, norm, eps), mat.multiply_many(program)

        def call(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = torch.empty(x.shape[0], mat.rows)
            mat.aim(program, first, last, x.data_ptr(), x.shape[0], out.data_ptr())
            self.pool.run(program)
            return out

        return call

    def attention_block(self, spec: AttentionSpec, weights: AttentionWeights) -> Attend:
        qkv = self._matrix(weights.qkv, weights.qkv_bias, spec.activations, "qkv")
        o = self._matrix(weights.o, weights.o_bias, spec.activations, "o")
        if qkv is None or o is None:
            return super().attention_block(spec, weights)
        self.note("attention", "any", "numba, quantized cache in place")
        return Attention(self.pool, self.workspace, spec, weights, qkv, o)

    def ffn_block(self, eps: float, weights: FfnWeights, *, activations: str = "16") -> Feed:
        gate_up = self._matrix(weights.gate_up, weights.gate_up_bias, activations, "gate_up")
        down = self._matrix(weights.down, weights.down_bias, activations, "down")
        if gate_up is None or down is None:
            return super().ffn_block(eps, weights, activations=activations)
        norm = weights.norm.float().contiguous()
        one = self._ffn_one(norm, eps, gate_up, down)
        many = self._ffn_many(norm, eps, gate_up, down)
        return lambda x: one(x) if x.shape[0] == 1 else many(x)

    def moe_block(self, eps: float, spec: MoESpec, weights: MoEWeights, *, activations: str = "16") -> Feed:
        gate_up = self._matrix(weights.gate_up, None, activations, "experts gate_up")
        down = self._matrix(weights.down, None, activations, "experts down")
        shared: tuple[Matrix, Matrix] | None = None
        if weights.shared_gate_up is not None and weights.shared_down is not None:
            first = self._matrix(weights.shared_gate_up, weights.shared_gate_up_bias, activations, "shared gate_up")
            second = self._matrix(weights.shared_down, weights.shared_down_bias, activations, "shared down")
            shared = None if first is None or second is None else (first, second)
        if gate_up is None or down is None or (weights.shared_gate_up is not None and shared is None):
            return super().moe_block(eps, spec, weights, activations=activations)
        one = MoEStep(self.pool, eps, spec, weights, gate_up, down, shared)
        beside: Feed | None = None
        if weights.shared_gate_up is not None and weights.shared_down is not None:
            widen = self.linear(weights.shared_gate_up, weights.shared_gate_up_bias, activations=activations)
            narrow = self.linear(weights.shared_down, weights.shared_down_bias, activations=activations)
            beside = lambda h: narrow(reference.silu_mul(widen(h)))  # noqa: E731
        router = Router(eps, spec, weights, beside)
        few = MoEFew(self.pool, self.workspace, router, gate_up, down)
        many = MoESweep(self.pool, self.workspace, router, gate_up, down)

        def feed(x: Tensor) -> Tensor:
            return one(x) if x.shape[0] == 1 else few(x) if x.shape[0] <= FEW else many(x)

        return feed

    def _ffn_one(self, norm: Tensor, eps: float, gate_up: Matrix, down: Matrix) -> Feed:
        program = Program(4)
        inner = gate_up.rows // 2
        hidden = aligned(padded(inner, 32), np.float32)
        first = gate_up.feed(program, None, norm, eps)
        gate_up.multiply(program, hidden, pairs=aligned(2 * padded(inner, 16) + 32, np.float32))
        down.feed(program, hidden)
        last = down.multiply(program, None)

        def call(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = row_of(down.rows)
            program.words[first, FIRST] = x.data_ptr()
            last.set(out.data_ptr(), x.data_ptr())
            self.pool.run(program)
            return out

        return call

    def _ffn_many(self, norm: Tensor, eps: float, gate_up: Matrix, down: Matrix) -> Feed:
        program = Program(4)
        feed = gate_up.feed_many(program, norm, eps)
        widen = gate_up.multiply_many(program, pairs=True)
        feed_down, narrow = down.feed_many(program), down.multiply_many(program)

        def call(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = torch.empty_like(x)
            hidden = self.workspace("hidden", 4 * x.shape[0] * down.columns)
            gate_up.aim(program, feed, widen, x.data_ptr(), x.shape[0], hidden)
            down.aim(program, feed_down, narrow, hidden, x.shape[0], out.data_ptr(), x.data_ptr())
            # Both share buffers by name, which may have grown since the first was aimed.
            gate_up.aim(program, feed, widen, x.data_ptr(), x.shape[0], hidden)
            self.pool.run(program)
            return out

        return call
