"""Mixture-of-experts blocks of the CPU: a few tokens in one program, experts by index; many tokens expert by expert."""

import numpy as np
import torch
from torch import Tensor

from qrun.backends.base import Feed, MoESpec, MoEWeights
from qrun.backends.cpu_matrix import Matrix, Workspace, padded, row_of
from qrun.kernels import cpu_moe, cpu_plain, reference
from qrun.kernels.cpu_pool import FIRST, Pool, Program, aligned

FEW = 16
"""Tokens that are better taken one by one at each of their experts."""


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
        for index, value in enumerate((chosen, k, down.rows, None, *strides, temp, gates, None, None, 1), 20):
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


class Router:
    """What many tokens have in common: the norm, the shared experts, and who goes to whom, in torch."""

    def __init__(self, eps: float, spec: MoESpec, weights: MoEWeights, shared: Feed | None) -> None:
        self._eps, self._spec, self._weights, self._shared = eps, spec, weights, shared

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [S, H] -> norm(x); x and the shared experts; and of the slots, by expert: tokens, experts and gates."""
        spec, weights = self._spec, self._weights
        h = reference.rms_norm(x, weights.norm, self._eps)
        gates, chosen = reference.route(
            h, weights.router, weights.correction, spec.top_k, normalise=spec.normalise, norm_min=spec.norm_min
        )
        out = x.clone() if self._shared is None else x + self._shared(h)
        order = torch.argsort(chosen.flatten(), stable=True)
        return h, out, order // spec.top_k, chosen.flatten()[order], gates.flatten()[order]


class MoEFew:
    """A few tokens: routed, then all experts that any of them chose in one program."""

    def __init__(self, pool: Pool, workspace: Workspace, router: Router, gate_up: Matrix, down: Matrix) -> None:
        self._pool, self._workspace, self._router = pool, workspace, router
        self._gate_up, self._down = gate_up, down
        self._program = program = Program(4)
        self._feed = gate_up.feed_many(program)
        self._widen = gate_up.multiply_experts(program, cpu_moe.widen)
        self._wide = padded(gate_up.rows // 2, 16)
        for index, value in {22: gate_up.rows // 2, 28: self._wide, 29: gate_up.rows}.items():
            program.put(self._widen, index, value)
        self._feed_down = down.feed_many(program)
        self._narrow = down.multiply_experts(program, cpu_moe.narrow)
        for index, value in {22: down.rows, 27: aligned(16 * pool.threads, np.float32), 32: 4 * down.rows}.items():
            program.put(self._narrow, index, value)

    def __call__(self, x: Tensor) -> Tensor:
        h, out, tokens, experts, gates = self._router(x)
        program, words, slots = self._program, self._program.words, len(tokens)
        inner = self._workspace("slots", 4 * slots * self._wide + 64)
        scratch = self._workspace("pairs", 8 * slots * self._wide + 64)
        words[self._widen, FIRST + 20 : FIRST + 22] = experts.data_ptr(), slots
        words[self._widen, FIRST + 23], words[self._widen, FIRST + 27] = inner, scratch
        words[self._widen, FIRST + 30] = tokens.data_ptr()
        words[self._narrow, FIRST + 20 : FIRST + 22] = experts.data_ptr(), slots
        words[self._narrow, FIRST + 23] = words[self._narrow, FIRST + 29] = out.data_ptr()
        words[self._narrow, FIRST + 28] = gates.data_ptr()
        words[self._narrow, FIRST + 30 : FIRST + 32] = tokens.data_ptr(), len(x)
        for _ in range(2):  # buffers are shared by name and may grow while the second is aimed
            self._gate_up.aim_experts(program, self._feed, self._widen, h.data_ptr(), len(x))
            self._down.aim_experts(program, self._feed_down, self._narrow, inner, slots, 4 * self._wide)
        self._pool.run(program)
        return out


class MoESweep:
    """Many tokens: routed, then each expert's tokens through one program that is aimed at it."""

    def __init__(self, pool: Pool, workspace: Workspace, router: Router, gate_up: Matrix, down: Matrix) -> None:
        self._pool, self._workspace, self._router = pool, workspace, router
        self._gate_up, self._down = gate_up, down
        self._experts = gate_up.weight.shape[0]
        self._program = program = Program(4)
        self._feeds = gate_up.feed_many(program), gate_up.multiply_many(program, pairs=True)
        self._feeds_down = down.feed_many(program), down.multiply_many(program)

    def __call__(self, x: Tensor) -> Tensor:
        h, out, tokens, experts, gates = self._router(x)
        sorted_h = h[tokens]
        results = torch.empty_like(sorted_h)
        counts = torch.bincount(experts, minlength=self._experts)
        begin = 0
        for expert in range(len(counts)):
            count = int(counts[expert])
            if count:
                self._expert(expert, sorted_h[begin : begin + count], results[begin : begin + count])
            begin += count
        return out.index_add_(0, tokens, results * gates[:, None])

    def _expert(self, expert: int, x: Tensor, out: Tensor) -> None:
        program, count = self._program, x.shape[0]
        self._gate_up.choose(program, self._feeds[1], expert)
        self._down.choose(program, self._feeds_down[1], expert)
        hidden = self._workspace("hidden", 4 * count * self._down.columns)
        for _ in range(2):  # buffers are shared by name and may grow while the second is aimed
            self._gate_up.aim(program, *self._feeds, x.data_ptr(), count, hidden)
            self._down.aim(program, *self._feeds_down, hidden, count, out.data_ptr())
        self._pool.run(program)
