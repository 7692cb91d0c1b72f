"""Rows without a mask: every token of a document sees all others, those behind it and those before it.

    o_t = finish(Σ_{j≤t} q_t e^{g_{j+1} + ... + g_t} k_jᵀ v_j + Σ_{j>t} q_t e^{g_t + ... + g_{j-1}} k_jᵀ v_j)

The row runs forwards, and over the reversed sequence again; what a token reads of its own write, (q_t · k_t) v_t, is
in both runs and is taken away once, as in LION (2502.16249). Each run decays by the gates of the tokens that it comes
to after the write. Without decay that is linear attention without mask, q_t Σ_j k_jᵀ v_j (2006.16236, section 3.2;
LASP-2 2502.07563); with a fixed one the mask is e^{g |t - j|}. A bonus is read before the decay, in both directions:
e^{g_{j+1} + ... + g_{t-1}} for j < t, e^{g_{t+1} + ... + g_{j-1}} for j > t, and the token itself by u. `finish`
divides by the count, if there is one: the numerators of both directions by the counts of both. Vision Mamba
(2401.09417) trains a second set of gates for the way back; here both ways have the same.

    decay    keep, fixed, scalar, channel, cross, timed     numbers for rows and columns: no matrix, no rotation
    update   outer, counted, tied, weighed                  does not look at the memory: no delta rule
    read     inclusive, bonus, ratio, damped                linear in the memory, but for the count

Other rows are refused. A delta rule, for one, writes what its memory lacks: two runs do not add up to one of both.

Softmax attention is without a mask, too; its window is |t - j| < window. Short convolutions, token shifts and running
sums keep looking backwards: they prepare a token, and a layer that has them is no mirror image of itself. Nothing has
a state: there is no next token where all are seen. Such a model is asked for tokens that are hidden from it
(`reference.objective`).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reference import recurrence as words
from reference.attention import checked
from reference.documents import end_to_end
from reference.late import READS, WRITES, comes_late
from reference.normal import FORGOTTEN, normal
from reference.ops import Ops
from reference.recurrence import Inputs, Row, check, prepare, with_one

COUNTS = {  # read -> what it does with the sums of both directions
    words.ratio: words.over_count,
    words.damped: lambda o: words.over_count(o, 1e-5),
}


def both_ways(ops: Ops, there_and_back: Callable | None = None) -> Ops:
    """The same ops, whose recurrence and attention see all tokens of a document.

    `there_and_back(row, tokens, constants, cu_seqlens)` is the sum of both runs' outputs, if it is more than two calls
    of `ops.recurrence`: where the sequence is cut. `parallel.lasp.over` cuts these ops. ValueError, in one line, for
    ops that are already cut, and from a call with a row that has no such form, with a state, or of one token (`step`).
    """
    if ops.cut and there_and_back is None:
        raise ValueError(f"{ops.name} cannot look both ways: first let ops look both ways, then cut them over ranks")
    ops = ops.one_way or ops

    def two_runs(row, tokens, constants, cu_seqlens):
        o = ops.recurrence(row, tokens, constants, None, cu_seqlens)[0]
        tokens, cu_seqlens = reverse(tokens, cu_seqlens)
        return o + ops.recurrence(row, tokens, constants, None, cu_seqlens)[0].flip(1)

    there_and_back = there_and_back or two_runs

    def run(row, tokens, constants=None, memory=None, cu_seqlens=None):
        refuse("recurrence", memory)
        summed, finish = without_count(row)
        constants = constants or {}
        check(row, tokens, constants, None, end_to_end(cu_seqlens))
        dtype, tokens, constants, _ = prepare(row, tokens, constants, None, None)  # three terms, rounded once
        if finish is not None:
            tokens = {**tokens, "v": with_one(tokens["v"])}
        o = there_and_back(summed, tokens, constants, cu_seqlens) - own(summed, tokens, constants)
        return (o if finish is None else finish(o)).to(dtype), None

    return ops._replace(
        name=f"{ops.name}, both ways",
        recurrence=run,
        attention=attention,
        step=one_alone,
        span=one_alone,
        one_way=ops,
    )


def refuse(name: str, state) -> None:
    if state is not None:
        raise ValueError(f"{name} both ways sees whole sequences: no state can be given")


def one_alone(row, *_, **__):
    """In place of `step` and of a span."""
    raise ValueError(f"{row.title} both ways has no memory that goes on from token to token: run whole sequences")


def without_count(row: Row) -> tuple[Row, Callable | None]:
    """The row with its count as one more value channel, and what divides by it; the row itself if it has none."""
    summed, finish = row, None
    if row.update is words.counted and row.read in COUNTS:
        summed = row._replace(update=words.outer, read=words.inclusive, memory="k v")
        finish = COUNTS[row.read]
    if not comes_late(summed):
        named = [
            ", ".join(word.__name__ for word in x) for x in (FORGOTTEN, (*WRITES, words.counted), (*READS, *COUNTS))
        ]
        raise ValueError(
            f"{row.title} has no form that runs both ways: expected decay {named[0]}, update {named[1]} and read "
            f"{named[2]}, got {row.decay.__name__}, {row.update.__name__} and {row.read.__name__}"
        )
    return summed, finish


def own(row: Row, tokens: Inputs, constants: Inputs) -> Float[Tensor, "b t h v"]:
    """What each token reads of its own write."""
    x = normal(row, {**tokens, **constants})
    q = x.q if x.u is None else x.q * x.u
    return (q * x.k).sum(-1, keepdim=True) * x.v


def reverse(tokens: Inputs, cu_seqlens: Int[Tensor, "*l n1"] | None) -> tuple[Inputs, Int[Tensor, "*l n1"] | None]:
    """The reversed sequence."""
    return {name: x.flip(1) for name, x in tokens.items()}, mirrored(cu_seqlens)


def mirrored(cu_seqlens: Int[Tensor, "*l n1"] | None) -> Int[Tensor, "*l n1"] | None:
    """The borders of the reversed sequence. A leading empty document becomes a last one: after it nothing remains."""
    return None if cu_seqlens is None else cu_seqlens.max() - cu_seqlens.flip(*range(cu_seqlens.ndim))


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    past=None,
    cu_seqlens=None,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h e"], None]:
    """o_i = Σ softmax(scale q_i · k_j) v_j over |i - j| < window, or all j of the document if None."""
    refuse("attention", past)
    checked(q, k, cu_seqlens, window)
    borders = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return torch.cat([seen(*(x[:, a:b] for x in (q, k, v)), window, scale) for a, b in pairwise(borders)], 1), None


def seen(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Float[Tensor, "b t h e"]:
    t = q.shape[1]
    if not t:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    mask = None
    if window is not None and window < t:
        place = torch.arange(t, device=q.device)
        mask = (place[:, None] - place).abs() < window
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(o, "b h t d -> b t h d")
