"""Triton kernels for gated slot attention: what queries find among slots' keys weighs slots' values.

With s = 1 - e^g, a number a slot and token, both memories fade slot by slot, by row, as in `channel.py`:

    N_t = Diag(e^{g_t}) N_{t-1} + s_tᵀ k_t     l_t = N_t q_t     p_t = softmax(l_t)
    M_t = Diag(e^{g_t}) M_{t-1} + s_tᵀ v_t     o_t = p_t M_t

The second is GLA with queries p, keys s and values v. The first is what GLA does backwards: were y_t = x_t N_t its
output and q_t the cotangent of y_t, that of x_t would be N_t q_t, which is l_t whatever x is. With E the cotangent of
l, Σ_t E_t·l_t = Σ_t q_t·(E_t N_t), so the gradients are those of GLA with queries E, keys s and values k at q, and dq
is its output. No second set of kernels, then, for columns that fade:

    l    dq of GLA at do = q, no more                         E = p (dp - Σ p dp)
    dq   its output, of queries E                             dk, ds, dg    its dv, dk, dg

b, s e^{b_C - b} and e^{b_C} are made once for both memories and both passes. In order (| between what waits for what):

    forwards     gates | sweep (N) | l | p | gates (p) | sweep (o, M)
    backwards    sweep (dv) | gradients (dp, dg) | E | gates (E) | dq, sweep (dk) | gradients (dg) | dg

s is never written: as keys that are tied to their gates it is made where g is read, and what it receives is in dg.

Where 16 bits are too few. l goes into an exponent: it is float32, and of N before a chunk, which may be large where the
differences between slots are small, what queries find is a product of two parts. p and E are queries that are rounded
as they fade (p e^b, E e^b), so not before; dp is float32 since E is what dp's have not in common. What is kept of N is
16 bits, as the products of the way back are: one compiled kernel is then the gradients of both memories.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128 and 64 slots, whose gates in float32 are 1
U: forwards gates 2 1/2, sweep 3 1/2 (N 2), l 7, N rounded 3, p 2, gates 4, sweep 4 1/2 (M 1): 26 1/2.
Backwards sweep 4 1/2, gradients 9, E 3, gates 4, dq 4, sweep 4 1/2, gradients 8, dg 3: 40. Kept for the gradient: A,
p e^b and s e^{b_C - b} 1/2 each, p and b 1 each, M 1, N 1: 5 1/2. Multiply-adds a chunk are those of `channel.py` for
m key channels, twice, and C·m·K + C·C·m and a product of N more, for l.

One token: a program takes a head, goes through both memories, some columns at a time, and writes them in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import channel, decay
from fast.kernels.channel import complement_of
from fast.kernels.decay import INTERPRETED, cdiv, next_power_of_2, padded, sequences_of

TOGETHER = 256 if INTERPRETED else 16  # rows (tokens and heads) a program
COLUMNS = 32  # of a memory at a time, for one token


@triton.jit(do_not_specialize=["count"])
def slots_weights(found, p, count, SLOTS: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr):
    """p = softmax(l) of the first SLOTS of M numbers a row, of the others 0. `found` is l."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    im = tl.arange(0, BM)
    at = row[:, None] * M + im[None, :]
    ok = (row < count)[:, None] & (im < M)[None, :]
    logits = tl.load(found + at, mask=ok & (im < SLOTS)[None, :], other=-float("inf"))
    logits = tl.where((row < count)[:, None], logits, 0.0)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    tl.store(p + at, weights / tl.sum(weights, 1)[:, None], mask=ok)


@triton.jit(do_not_specialize=["count"])
def slots_cotangents(p, dp, dl, count, M: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr):
    """dl = p (dp - Σ p dp). Reads p and dp, writes dl."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    im = tl.arange(0, BM)
    at = row[:, None] * M + im[None, :]
    ok = (row < count)[:, None] & (im < M)[None, :]
    weights, change = tl.load(p + at, mask=ok, other=0.0), tl.load(dp + at, mask=ok, other=0.0)
    tl.store(dl + at, weights * (change - tl.sum(weights * change, 1)[:, None]), mask=ok)


@triton.jit
def slots_step(
    q, k, v, g, memory, o,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One token of one head: reads and writes both memories [N M] once, in place."""
    row = tl.program_id(0).to(tl.int64)
    im, ic = tl.arange(0, BM), tl.arange(0, BC)
    in_m = im < M
    gate = tl.load(g + row * M + im, mask=in_m, other=0.0)
    fade, write = tl.exp(gate), complement_of(gate)
    at = memory + row * M * (K + V) + im[:, None] * (K + V)
    found = tl.zeros((BM,), tl.float32)
    for c in range(0, K, BC):
        in_c = c + ic < K
        in_cell = in_m[:, None] & in_c[None, :]
        key = tl.load(k + row * K + c + ic, mask=in_c, other=0.0).to(tl.float32)
        query = tl.load(q + row * K + c + ic, mask=in_c, other=0.0).to(tl.float32)
        cell = at + (c + ic)[None, :]
        after = tl.load(cell, mask=in_cell, other=0.0) * fade[:, None] + write[:, None] * key[None, :]
        tl.store(cell, after, mask=in_cell)
        found += tl.sum(after * query[None, :], 1)
    found = tl.where(in_m, found, -float("inf"))
    weights = tl.exp(found - tl.max(found, 0))
    weights /= tl.sum(weights, 0)
    for c in range(0, V, BC):
        in_c = c + ic < V
        in_cell = in_m[:, None] & in_c[None, :]
        value = tl.load(v + row * V + c + ic, mask=in_c, other=0.0).to(tl.float32)
        cell = at + (K + c + ic)[None, :]
        after = tl.load(cell, mask=in_cell, other=0.0) * fade[:, None] + write[:, None] * value[None, :]
        tl.store(cell, after, mask=in_cell)
        tl.store(o + row * V + c + ic, tl.sum(weights[:, None] * after, 0), mask=in_c)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K, V and M multiples of 16, gates g : b t h M and memories n h M K, n h M V float32.


def by_rows(kernel, *tensors: Tensor, **sizes: int) -> None:
    """Of all tensors b t h M, some rows a program."""
    M = tensors[0].shape[-1]
    count = tensors[0].numel() // M
    decay.launch(kernel, cdiv(count, TOGETHER), *tensors, count, M=M, BM=next_power_of_2(M), ROWS=TOGETHER, **sizes)


def forward(q, k, v, g, keys, values, borders, slots: int, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last N and M, p, A, p e^b, s e^{b_C - b}, e^{b_C}, b, N and M before every chunk), of the first
    `slots` slots; more only fill tiles. `keep`: what the gradient needs is kept; else all after M are empty."""
    n = sequences_of(q, borders)
    _, *known = channel.gates(None, None, g, None, borders, q)
    written, fades, sums = known
    segments = channel.segments_for(written, k, n)
    last_keys, met_keys = channel.onwards(None, written, k, fades, None, keys, borders, segments, None, torch.float32)
    found = torch.empty_like(g)
    channel.gradients(q, None, g, k, None, sums, met_keys, None, borders, found, tied=True)
    p, o, scores = torch.empty_like(g), torch.empty_like(v), channel.scores_for(written)
    by_rows(slots_weights, found, p, SLOTS=slots)
    asked = channel.gates(p, None, g, None, borders, q, scores, known)[0]
    segments = channel.segments_for(written, v, n)
    last_values, met_values = channel.onwards(
        asked, written, v, fades, scores, values, borders, segments, o, q.dtype if keep else None
    )
    kept = p, scores, asked, *known, met_keys.to(q.dtype) if keep else None, met_values
    return o, last_keys, last_values, *(kept if keep else (q.new_empty(0) for _ in kept))


def backward(
    do, dlast_keys, dlast_values, q, k, v, g, borders, p, scores, asked, written, fades, sums, met_keys, met_values
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dg, dkeys, dvalues) from the cotangents of o and of the last memories (None: zeros)."""
    known, n = (written, fades, sums), sequences_of(q, borders)
    segments = channel.segments_for(written, v, n)
    dp, _, dv, dg, _, dvalues = channel.backward(
        do, dlast_values, p, g, v, None, borders, scores, asked, *known, met_values, segments, True, False, tied=True
    )
    dl, scores = torch.empty_like(p), torch.empty_like(scores)
    by_rows(slots_cotangents, p, dp, dl)
    del dp  # 1 U
    asked = channel.gates(dl, None, g, None, borders, q, scores, known)[0]
    dq = channel.outputs(asked, k, scores, met_keys, borders)
    segments = channel.segments_for(written, k, n)
    _, _, dk, dg2, _, dkeys = channel.backward(
        q, dlast_keys, dl, g, k, None, borders, scores, asked, *known, met_keys, segments, True, False, want_q=False,
        tied=True,
    )  # fmt: skip
    return dq, dk, dv, dg.add_(dg2), dkeys, dvalues


def step(q, k, v, g, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k : b h K, v : b h V, g : b h M; overwrites memory [N M]."""
    (*_, K), V, M = k.shape, v.shape[-1], g.shape[-1]
    o = torch.empty_like(v, dtype=torch.float32)
    decay.launch(
        slots_step, g.numel() // M, q, k, v, g, memory, o,
        K=K, V=V, M=M, BM=padded(M), BC=COLUMNS, num_warps=4,
    )  # fmt: skip
    return o
