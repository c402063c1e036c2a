"""The search of `qrun.formats.viterbi` on a CPU: row after row, in the caller's thread, which need not be alone."""
# pyright: basic

import numpy as np
from numba import njit, types

from qrun.kernels.cpu_pool import _kept

_STATES, _SURVIVORS = 64, 16
_rows = types.float32[:, ::1]


_arguments = _rows, _rows, types.float32[::1], types.uint8[::1], types.boolean, types.uint8[:, ::1]


@_kept(njit(types.void(*_arguments), nogil=True, cache=True, fastmath=True))
def search(target, scale, table, after, end, states):
    """Fill states [R, K] for target and scale [R, K]; ``after`` [R], or empty where any state may begin."""
    rows, steps = target.shape
    cost = np.empty(_STATES, np.float32)
    least = np.empty(_SURVIVORS, np.float32)
    bits, best = cost.view(np.int32), least.view(np.int32)
    came = np.empty((steps, _SURVIVORS), np.uint8)
    for r in range(rows):
        least[:] = 0 if len(after) == 0 else 1e30
        if len(after) != 0:
            least[after[r] >> 2] = 0
        for k in range(steps):
            if k != 0:
                for q in range(_SURVIVORS):
                    # Costs are positive, so their bits sort as they do: the lowest two say where each came from.
                    low = min(bits[4 * q] & -4, (bits[4 * q + 1] & -4) | 1)
                    high = min((bits[4 * q + 2] & -4) | 2, bits[4 * q + 3] | 3)
                    best[q] = min(low, high)
                    came[k, q] = best[q] & 3
            want, step = target[r, k], scale[r, k]
            for branch in range(4):
                for q in range(_SURVIVORS):
                    miss = want - table[_SURVIVORS * branch + q] * step
                    cost[_SURVIVORS * branch + q] = least[q] + miss * miss
        state = 0
        for s in range(4 if end else _STATES):
            if cost[s] < cost[state]:
                state = s
        for k in range(steps - 1, -1, -1):
            states[r, k] = state
            survivor = state & (_SURVIVORS - 1)
            state = (survivor << 2) | came[k, survivor]
