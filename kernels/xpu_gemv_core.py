"""The kernel of `xpu_gemv`: rows of a weight times a few tokens, or of the experts that slots name times their rows.

It knows the layout of codes and scales, not what a product is for nor how a weight is shared out among programs.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from qrun.kernels.gpu_bits import narrow


@triton.jit
def decode(w, table, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """The code at bit SHIFT of words as float32, without its scale."""
    if KIND == "int4":
        q = ((w >> SHIFT) & 15).to(tl.float32)
    elif KIND == "int8":
        q = ((w << (24 - SHIFT)) >> 24).to(tl.float32)
    elif KIND == "codebook":
        q = tl.load(table + ((w >> SHIFT) & 15))
    else:
        tl.static_assert(KIND == "fp8")
        # e4m3's bits as a float32's highest ones; 2^120 is the difference of the exponents' biases.
        q = (((w << (24 - SHIFT)) >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return q


@triton.jit
def inputs(x, base, K, W: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr):
    """The columns of W words from ``base`` on: a tensor [W] for each place in a word, and the words' sums [W].

    They are loaded as they lie and split, for a lane that gathers every PER-th number would touch as many lines.
    """
    k = base + tl.arange(0, W)[:, None] * PER + tl.arange(0, PER)[None, :]
    if EVEN:
        v = tl.load(x + k).to(tl.float32)
    else:
        v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if PER == 8:
        even, odd = tl.split(tl.reshape(v, (W, 4, 2)))
        x04, x26 = tl.split(tl.reshape(even, (W, 2, 2)))
        x15, x37 = tl.split(tl.reshape(odd, (W, 2, 2)))
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        parts = (x0, x1, x2, x3, x4, x5, x6, x7)
        total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    else:
        even, odd = tl.split(tl.reshape(v, (W, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        parts = (x0, x1, x2, x3)
        total = (x0 + x1) + (x2 + x3)
    return parts, total


@triton.jit
def times(
    x,
    x_row,
    tokens,
    codes,
    scale,
    zero,
    offset,
    table,
    first,
    N,
    codes_row,
    scale_group,
    K,
    KP: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows ``first`` … of W times M rows of x, the last of either again where there are no more: [R · M].

    Tensors have one dimension, a word a lane, and rows are unrolled: x stays in the lanes that loaded it, and nothing
    is exchanged before the sums at the end.
    """
    PER: tl.constexpr = 8 if KIND == "int4" or KIND == "codebook" else 4
    place = tl.arange(0, R * M)[:, None]
    word = tl.arange(0, W)
    acc = tl.zeros((R * M, W), tl.float32)
    for base in range(0, KP, W * PER):
        if GROUP >= KP:
            g = 0
        else:
            g = (base + word * PER) // GROUP
            if not EVEN:
                g = tl.minimum(g, KP // GROUP - 1)  # past the end x is zero
        # Codes are loaded and taken apart for the first token, which the compiler sees; x is needed for one at a time.
        for m in tl.static_range(M):
            parts, total = inputs(x + tl.minimum(m, tokens - 1) * x_row, base, K, W, PER, EVEN)
            for r in tl.static_range(R):
                row = tl.minimum(first + r, N - 1)
                at = codes + row.to(tl.int64) * codes_row + (base // PER + word)
                if EVEN:
                    w = tl.load(at)
                else:
                    w = tl.load(at, mask=base // PER + word < KP // PER, other=0)
                t = decode(w, table, 0, KIND) * parts[0]
                for j in tl.static_range(1, PER):
                    t += decode(w, table, j * (32 // PER), KIND) * parts[j]
                at = g * scale_group + row
                if zero is not None:
                    t -= tl.load(zero + at).to(tl.float32) * total
                t *= tl.load(scale + at).to(tl.float32)
                if offset is not None:
                    t += tl.load(offset + at).to(tl.float32) * total
                acc = tl.where(place == r * M + m, acc + t[None, :], acc)
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x,
    out,
    codes,
    scale,
    zero,
    offset,
    table,
    factor,
    chosen,
    gates,
    tokens,
    x_row,
    out_row,
    codes_row,
    codes_expert,
    scale_group,
    scale_expert,
    N,
    K,
    KP: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    EACH: tl.constexpr,
):
    """Program (i, b): rows R·i … of W for all tokens; by experts, for slot b, or, added up, for all SLOTS of token b.

    Absent pointers are None. EACH: a factor an expert.
    """
    block = tl.program_id(1)
    first = tl.program_id(0) * R
    row = first + tl.arange(0, R * M) // M
    token = tl.arange(0, R * M) % M
    y = tl.zeros((R * M,), tl.float32)
    COUNT: tl.constexpr = SLOTS if gates is not None else 1
    for i in range(COUNT):
        if SLOTS == 0:
            e = 0
            source = x
        else:
            slot = block * COUNT + i
            e = tl.load(chosen + slot).to(tl.int64)
            source = x + (slot // SLOTS if SHARED else slot).to(tl.int64) * x_row
        groups = e * scale_expert
        part = times(
            source,
            x_row,
            tokens,
            codes + e * codes_expert,
            scale + groups,
            None if zero is None else zero + groups,
            None if offset is None else offset + groups,
            table,
            first,
            N,
            codes_row,
            scale_group,
            K,
            KP,
            GROUP,
            KIND,
            M,
            R,
            W,
            EVEN,
        )
        if factor is not None:
            part *= tl.load(factor + (e if EACH else 0))
        if gates is not None:
            part *= tl.load(gates + slot)
        y += part
    to = out + (block + token).to(tl.int64) * out_row + row
    tl.store(to, narrow(y, out.dtype.element_ty), mask=(token < tokens) & (row < N))
