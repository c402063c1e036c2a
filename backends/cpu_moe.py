"""Mixture-of-experts blocks of the CPU: one token in one program, experts by index; many tokens expert by expert."""

import numpy as np
import torch
from torch import Tensor

from qrun.backends.base import Feed, MoESpec, MoEWeights
from qrun.backends.cpu_matrix import Matrix, Workspace, padded, row_of
from qrun.kernels import cpu_moe, cpu_plain, reference
from qrun.kernels.cpu_pool import FIRST, Pool, Program, aligned


class MoEStep:
    """One token: norm, router, choice, experts, shared experts and residual."""

    def __init__(
        self,
        pool: Pool,
        eps: float,
        spec: MoESpec,
        weights: MoEWeights,
        gate_up: Matrix,
        down: Matrix,
        shared: tuple[Matrix, Matrix] | None,
    ) -> None:
        self._pool = pool
        k, pairs, hidden = spec.top_k, gate_up.rows // 2, gate_up.columns
        experts = weights.router.shape[0]
        wide = padded(pairs, 16)
        h = aligned(padded(hidden, 32), np.float32)
        logits = aligned(padded(experts, 16), np.float32)
        chosen, gates = aligned(k, np.int64), aligned(padded(k, 16), np.float32)
        inner = aligned(k * wide + 16, np.float32)
        correction = None if weights.correction is None else weights.correction.float().contiguous()
        self._program = program = Program(12)
        self._norm = program.add(cpu_plain.norm(), None, 0, 1, hidden, weights.norm.float().contiguous(), eps, h, 0)
        program.add(
            cpu_plain.plain(False), weights.router.float().contiguous(), hidden, h, experts, logits, None, None, None
        )
        program.add(
            cpu_moe.route(), logits, experts, correction, k, int(spec.normalise), float(spec.norm_min), chosen, gates
        )
        self._shared = None
        if shared is not None:
            between = aligned(padded(shared[1].columns, 32), np.float32)
            shared[0].feed(program, h)
            shared[0].multiply(program, between, pairs=aligned(2 * padded(shared[0].rows // 2, 16) + 32, np.float32))
            shared[1].feed(program, between)
            self._shared = shared[1].multiply(program, None)
        gate_up.feed(program, h)
        row = gate_up.multiply_experts(program, cpu_moe.widen)
        scratch = aligned(2 * k * wide + 16, np.float32)
        for index, value in enumerate((chosen, k, pairs, inner, 0, 0, 0, scratch, wide, gate_up.rows), 20):
            program.put(row, index, value)
        strides = down.feed_slots(program, inner, 4 * wide, k)
        self._narrow = row = down.multiply_experts(program, cpu_moe.narrow)
        temp = aligned(16 * pool.threads, np.float32)
        for index, value in enumerate((chosen, k, down.rows, None, *strides, temp, gates, None), 20):
            program.put(row, index, value)
        self._width = down.rows

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = row_of(self._width)
        words = self._program.words
        words[self._norm, FIRST] = x.data_ptr()
        words[self._narrow, FIRST + 23] = out.data_ptr()
        if self._shared is None:
            words[self._narrow, FIRST + 29] = x.data_ptr()
        else:
            self._shared.set(out.data_ptr(), x.data_ptr())
            words[self._narrow, FIRST + 29] = out.data_ptr()
        self._pool.run(self._program)
        return out


class MoESweep:
    """Many tokens: routed in torch, then each expert's tokens through one program that is aimed at it."""

    def __init__(
        self,
        pool: Pool,
        workspace: Workspace,
        eps: float,
        spec: MoESpec,
        weights: MoEWeights,
        gate_up: Matrix,
        down: Matrix,
        shared: Feed | None,
    ) -> None:
        self._pool, self._workspace = pool, workspace
        self._eps, self._spec, self._weights = eps, spec, weights
        self._gate_up, self._down, self._shared = gate_up, down, shared
        self._program = program = Program(4)
        self._feeds = gate_up.feed_many(program), gate_up.multiply_many(program, pairs=True)
        self._feeds_down = down.feed_many(program), down.multiply_many(program)

    def __call__(self, x: Tensor) -> Tensor:
        spec, weights = self._spec, self._weights
        h = reference.rms_norm(x, weights.norm, self._eps)
        gates, chosen = reference.route(
            h, weights.router, weights.correction, spec.top_k, normalise=spec.normalise, norm_min=spec.norm_min
        )
        out = x.clone() if self._shared is None else x + self._shared(h)
        order = torch.argsort(chosen.flatten(), stable=True)
        tokens = order // spec.top_k
        sorted_h = h[tokens]
        results = torch.empty_like(sorted_h)
        counts = torch.bincount(chosen.flatten(), minlength=weights.router.shape[0])
        begin = 0
        for expert in range(len(counts)):
            count = int(counts[expert])
            if count:
                self._expert(expert, sorted_h[begin : begin + count], results[begin : begin + count])
            begin += count
        return out.index_add_(0, tokens, results * gates.flatten()[order, None])

    def _expert(self, expert: int, x: Tensor, out: Tensor) -> None:
        program, count = self._program, x.shape[0]
        self._gate_up.choose(program, self._feeds[1], expert)
        self._down.choose(program, self._feeds_down[1], expert)
        hidden = self._workspace("hidden", 4 * count * self._down.columns)
        for _ in range(2):  # buffers are shared by name and may grow while the second is aimed
            self._gate_up.aim(program, *self._feeds, x.data_ptr(), count, hidden)
            self._down.aim(program, *self._feeds_down, hidden, count, out.data_ptr())
        self._pool.run(program)
