"""LASP: one long sequence cut over ranks. What travels is what a segment does to a memory, never its tokens.

    forward    (A_r, S_r) = span(my tokens);  gather (A, S);  M_0 = 0,  M_{r+1} = A_r ⋄ M_r + S_r;  run from M_r
    backward   G_r = what M_r receives from my outputs;  gather G;  D_{W-1} = 0,  D_r = G_{r+1} + A_{r+1}ᵀ ⋄ D_{r+1}
               dS_r = D_r,  dA_r = gradient of A ⋄ M at (D_r, M_r);  backward of span

One gather a layer and direction, of a size that does not know the sequence's length. This is LASP-2 (2502.07563) with
transitions: any row of the table, packed documents, segments of any length. A short convolution and a token shift are
spans as well: their memory is the last inputs, of which a segment pushes its own in and as many old ones out. Softmax
attention gathers keys and values.

Cut documents: in a segment's `cu_seqlens` a leading empty document, [0, 0, ...], says that the first token begins a
document. What comes in from earlier ranks belongs to document 0; all others start from zeros.

    W ranks   r this rank   T_r its tokens, any number, 0 too   b h k v as in `reference.recurrence`
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from parallel import comm
from parallel.comm import Group
from reference.attention import Past
from reference.cache import fresh, recent
from reference.ops import Ops
from reference.span import TRANSITION, Span, fold, fold_back

# ----------------------------------------------------------------------------------------------- cutting a batch


def cut(batch: NamedTuple, ranks: int, rank: int, segment: tuple[int, int] | None = None) -> NamedTuple:
    """The part of a packed batch that one rank holds: tokens [N r / W, N (r + 1) / W), or those of `segment`.

    Every field is 1 N, but for `cu_seqlens`. Cut after labels and positions are made: a segment's last token keeps its
    label, its first token its position.
    """
    if ranks == 1 and segment is None:
        return batch
    n = batch.tokens.shape[1]
    start, stop = segment or (n * rank // ranks, n * (rank + 1) // ranks)
    mine = {name: x[:, start:stop] for name, x in batch._asdict().items() if name != "cu_seqlens"}
    return batch._replace(**mine, cu_seqlens=cut_borders(batch.cu_seqlens, start, stop))


def cut_borders(cu_seqlens: Int[Tensor, " n1"], start: int, stop: int) -> Int[Tensor, " m1"]:
    """The borders inside tokens [start, stop), counted from start: [0, 0, ...] if a document begins at start.

    Empty documents have no token and are left out. A segment of no tokens has none to begin with either: [0, 0].
    """
    if not 0 <= start <= stop <= int(cu_seqlens[-1]):
        raise ValueError(f"segment [{start}, {stop}) does not lie in the {int(cu_seqlens[-1])} tokens of cu_seqlens")
    borders = cu_seqlens.unique()
    inside = borders[(borders >= start) & (borders < stop)]
    return torch.cat([cu_seqlens.new_tensor([start]), inside, cu_seqlens.new_tensor([stop])]) - start


# ---------------------------------------------------------------------------------------- the memory at the border


def enter(span: Span, group: Group) -> Float[Tensor, "b h k v"]:
    """The memory before my segment, from every rank's span; differentiable in A and S.

    One gather forward, of (A, S), and one backward, of the memories' cotangents, on every rank: the first takes part
    though nothing comes before it, the last though nothing comes after. A rank that stayed away would meet the others
    in the next layer's gather.
    """
    return torch.ops.linear_moe.enter(span.A.to(span.S.dtype), span.S, span.kind, group.group_name)[0]


def _enter(A: Tensor, S: Tensor, kind: str, group: str) -> tuple[Tensor, Tensor]:
    """The memory before my segment, and every rank's A for the way back."""
    group = comm.named(group)
    gathered = comm.gather(torch.cat([A.flatten(), S.flatten()]), group)
    pairs = [both.split([A.numel(), S.numel()]) for both in gathered]
    spans = [Span(a.view(A.shape), s.view(S.shape), kind) for a, s in pairs]
    with torch.autocast(S.device.type, enabled=False):
        M = fold(spans[: comm.rank(group)], torch.zeros_like(S))[-1]
    return M, torch.stack([span.A for span in spans])


def _enter_backward(G: Tensor, M: Tensor, As: Tensor, kind: str, group: str) -> tuple[Tensor, Tensor]:
    """(dA, dS) from G, what the memory before my segment receives from my outputs."""
    group = comm.named(group)
    later = comm.rank(group) + 1
    Gs = comm.gather(G, group)
    spans = [Span(A, None, kind) for A in As[later:]]
    with torch.autocast(G.device.type, enabled=False):
        D = fold_back(spans, Gs[later:], torch.zeros_like(G))[0]
        dA = gradient_of_transition(kind, As[later - 1], D, M)
    return dA, D.clone()  # an op's output may not be a piece of the buffer


def gradient_of_transition(kind: str, A: Tensor, D: Tensor, M: Tensor) -> Tensor:
    """dA, from A, D, the cotangent of the memory that leaves my segment, and M, the memory that enters it."""
    return TRANSITION[kind].gradient(A, D, M)


def _enter_shapes(A, S, kind, group):
    return torch.empty_like(S), A.new_empty(comm.size(comm.named(group)), *A.shape)


def _enter_backward_shapes(G, M, As, kind, group):
    return As.new_empty(As.shape[1:]), torch.empty_like(G)


def _keep_memory(ctx, inputs, output):
    ctx.kind, ctx.group = inputs[2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _back_to_span(ctx, G, _):
    M, As = ctx.saved_tensors
    G = torch.zeros_like(M) if G is None else G.contiguous()
    dA, dS = torch.ops.linear_moe.enter_backward(G, M, As, ctx.kind, ctx.group)
    return dA if ctx.needs_input_grad[0] else None, dS, None, None


class _Depend(torch.autograd.Function):
    """y, which from now on depends on the others too, with no gradient for them."""

    @staticmethod
    def forward(ctx, y, *others):
        ctx.count = len(others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *[None] * ctx.count


def attached(y: Tensor, gathered: Tensor | None, inputs: list[Tensor | None]) -> Tensor:
    """y, from which the backward pass reaches `gathered` and `inputs` on every rank.

    A segment of no tokens, or one that begins a document, uses nothing of what enters it. Its backward pass must still
    come by the same collectives in the same order (autograd takes the newest first, among those it reaches), and end
    in a gradient, of zeros, for the same parameters.
    """
    inputs = [x for x in inputs if x is not None]
    if not y.numel():
        y = y + 0 * sum(x.sum() for x in inputs)
    return _Depend.apply(y, *inputs) if gathered is None else _Depend.apply(y, gathered)


# ------------------------------------------------------------------------------------------------------- the ops


def over(ops: Ops, group: Group) -> Ops:
    """The same ops for a sequence cut over the ranks of `group`, in rank order. For training: an op that is given a
    state raises ValueError. So does, here and in one line, a field of `ops` that nobody has said how to cut."""
    if comm.size(group) == 1:
        return ops
    for name in ops._fields:
        if name not in CUT and name not in WHOLE:
            raise ValueError(f"cannot cut ops.{name} over a sequence: expected one of {', '.join((*CUT, *WHOLE))}")
    name = f"{ops.name} over {comm.size(group)} ranks of a sequence"
    return ops._replace(name=name, **{name: make(ops, group) for name, make in CUT.items()})


def recurrence(ops: Ops, group: Group) -> Callable:
    """One gather each way. Receives (W - 1)(bytes of A and S) forward, (W - 1)(bytes of S) backward. The memory that
    it returns is the one that leaves my segment."""

    def run(row, tokens, constants=None, memory=None, cu_seqlens=None):
        refuse("recurrence", memory)
        inputs = [*tokens.values(), *(constants or {}).values()]
        span = ops.span(row, tokens, constants, cu_seqlens)
        M = enter(span._replace(S=attached(span.S, None, inputs)), group)
        o, last = ops.recurrence(row, tokens, constants, for_first(M, cu_seqlens), cu_seqlens)
        return attached(o, M, inputs), last

    return run


def short_convolution(ops: Ops, group: Group) -> Callable:
    """One gather each way, of the last w - 1 inputs and, forward, (w - 1)² numbers that say how far they move."""

    def run(x, weight, bias=None, activation=None, taps=None, cu_seqlens=None):
        refuse("short_convolution", taps)
        if weight.shape[-1] == 1:
            return ops.short_convolution(x, weight, bias, activation, None, cu_seqlens)
        before = enter(window(x, weight.shape[-1] - 1, cu_seqlens), group)
        y, taps = ops.short_convolution(x, weight, bias, activation, for_first(before[:, 0], cu_seqlens), cu_seqlens)
        return attached(y, before, [x, weight, bias]), taps

    return run


def token_shift(ops: Ops, group: Group) -> Callable:
    """One gather each way, of the last input and, forward, one number."""

    def run(x, last=None, cu_seqlens=None):
        refuse("token_shift", last)
        before = enter(window(x, 1, cu_seqlens), group)
        y, last = ops.token_shift(x, for_first(before[:, 0, 0], cu_seqlens), cu_seqlens)
        return attached(y, before, [x]), last

    return run


def running_sum(ops: Ops, group: Group) -> Callable:
    """One gather each way, of a segment's sum and, forward, one number a sequence. A sum is a memory that keeps."""

    def run(x, last=None, cu_seqlens=None):
        refuse("running_sum", last)
        S = attached(ops.running_sum(x, None, cu_seqlens)[1], None, [x])[-x.shape[0] :, None, None]
        whole = cu_seqlens is None or len(cu_seqlens) == 2  # else only the last document goes on
        before = enter(Span(S.new_full(S.shape[:2], float(whole)), S, "scalar"), group)
        y, last = ops.running_sum(x, for_first(before[:, 0, 0], cu_seqlens), cu_seqlens)
        return attached(y, before, [x]), last

    return run


def window(x: Float[Tensor, "b t c"], reach: int, cu_seqlens) -> Span:
    """What a segment does to the last `reach` inputs: they move up by T_r places, and its own follow.

    A span like any other, of one head, with places for key channels: A is 1 where an old input moves to. Segments
    shorter than `reach`, and empty ones, pass on what they got.
    """
    b, t, _ = x.shape
    new = min(t, reach)
    A, S = torch.diag(x.new_ones(reach - new), new), F.pad(x[:, t - new :], (0, 0, reach - new, 0))
    if cu_seqlens is not None and len(cu_seqlens) > 2:  # a border: only the last document goes on
        place = torch.arange(t - reach, t, device=x.device)
        A, S = torch.zeros_like(A), torch.where((place >= cu_seqlens[-2])[:, None], S, 0)
    return Span(A.expand(b, 1, reach, reach), S[:, None], "matrix")


def for_first(state: Float[Tensor, "b ..."], cu_seqlens) -> Float[Tensor, "n ..."]:
    """The state that comes in is document 0's; the others start from zeros."""
    if cu_seqlens is None:
        return state
    return torch.cat([state, state.new_zeros(len(cu_seqlens) - 2, *state.shape[1:])])


def refuse(name: str, state) -> None:
    if state is not None:
        raise ValueError(f"{name} over a cut sequence starts at the sequence's beginning: no state can be given")


# ------------------------------------------------------------------------------------------------ softmax attention


def attention(ops: Ops, group: Group) -> Callable:
    """Every rank gathers all keys and values (LASP-2H) and takes those of its own first document as its past.

    Segments are padded to the longest, whose length takes a first, tiny gather. Received are (W - 1)(16 + bytes of the
    padded k and v) forward; backward (W - 1) times their gradient in float32, in which the ranks' shares are summed.
    A window shortens what is attended to, not what is gathered. No cache comes back: decoding does not run on a cut
    sequence.
    """

    def run(q, k, v, past=None, cu_seqlens=None, window=None, scale=None):
        refuse("attention", past)
        layout = layout_of(k, cu_seqlens, group)
        own = torch.cat([k, v], -1)
        padded = F.pad(own, (0, 0, 0, 0, 0, max(layout.lengths) - own.shape[1]))
        everyone = torch.ops.linear_moe.gather_tokens(padded, group.group_name)
        earlier = [x[:, :length] for x, length in zip(everyone, layout.lengths, strict=True)][: comm.rank(group)]
        before = torch.cat([own[:, :0], *earlier], 1)[:, layout.opened :]
        before = before.split([k.shape[-1], v.shape[-1]], -1)
        o = continued(ops, q, k, v, before, layout.first, cu_seqlens, {"window": window, "scale": scale})
        return attached(o, everyone, [q, k, v]), None

    return run


class Layout(NamedTuple):
    """Who has which tokens."""

    lengths: list[int]  # of every rank's segment
    opened: int  # the token, counted over all ranks, where the document that enters my segment began
    first: int  # how many of my tokens belong to it


def layout_of(x: Float[Tensor, "b t ..."], cu_seqlens, group: Group) -> Layout:
    t = x.shape[1]
    single = cu_seqlens is None or len(cu_seqlens) == 2
    last = torch.tensor(-1, device=x.device) if single else cu_seqlens[-2].long()  # where my last document begins
    everyone = comm.gather(torch.stack([torch.tensor(t, device=x.device), last]), group)
    lengths, lasts = torch.stack(everyone).T.tolist()
    opened = start = 0
    for length, last in list(zip(lengths, lasts, strict=True))[: comm.rank(group)]:
        opened = opened if last < 0 else start + last
        start += length
    return Layout(lengths, opened, t if single else int(cu_seqlens[1]))


def continued(
    ops: Ops, q, k, v, before: tuple[Tensor, Tensor], first: int, cu_seqlens, how: dict
) -> Float[Tensor, "b t h e"]:
    """Attention over my tokens: the first document (where nothing is packed, all rows) has a past, the others none."""
    past = recent(fresh(Past, *before), how["window"]) if before[0].shape[1] else None
    o = ops.attention(q[:, :first], k[:, :first], v[:, :first], past, **how)[0]
    if first == q.shape[1]:
        return o
    rest = ops.attention(q[:, first:], k[:, first:], v[:, first:], None, cu_seqlens[1:] - first, **how)[0]
    return torch.cat([o, rest], 1)


def _gather_tokens(x: Tensor, group: str) -> Tensor:
    """Every rank's x, stacked."""
    return torch.stack(comm.gather(x, comm.named(group)))


def _gather_tokens_backward(D: Tensor, group: str) -> Tensor:
    """The sum over ranks of what my x received."""
    wide = torch.promote_types(D.dtype, torch.float32)
    return comm.scatter(D.to(wide), comm.named(group)).to(D.dtype, copy=True)


def _gather_tokens_shapes(x, group):
    return x.new_empty(comm.size(comm.named(group)), *x.shape)


def _gather_tokens_backward_shapes(D, group):
    return torch.empty_like(D[0])


def _keep_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _back_to_tokens(ctx, D):
    return torch.ops.linear_moe.gather_tokens_backward(D, ctx.group), None


CUT = {
    "recurrence": recurrence,
    "short_convolution": short_convolution,
    "token_shift": token_shift,
    "running_sum": running_sum,
    "attention": attention,
}
# Acts on each token alone, is about my own tokens by definition, or belongs to the mesh (total).
WHOLE = ("name", "span", "step", "experts", "norm", "token_losses", "total", "kept")

# ---------------------------------------------------------------------------------------------- known to torch
# What communicates is an op of torch's, so that a compiler sees the same graph on every rank. Registered by hand:
# the decorator `custom_op` imports the compiler at the first call, which takes seconds.


OPS = {
    "enter": ("(Tensor A, Tensor S, str kind, str group) -> (Tensor, Tensor)", _enter, _enter_shapes),
    "enter_backward": (
        "(Tensor G, Tensor M, Tensor As, str kind, str group) -> (Tensor, Tensor)",
        _enter_backward,
        _enter_backward_shapes,
    ),
    "gather_tokens": ("(Tensor x, str group) -> Tensor", _gather_tokens, _gather_tokens_shapes),
    "gather_tokens_backward": (
        "(Tensor D, str group) -> Tensor",
        _gather_tokens_backward,
        _gather_tokens_backward_shapes,
    ),
}
for name, (schema, function, shapes) in OPS.items():
    torch.library.define(f"linear_moe::{name}", schema)
    torch.library.impl(f"linear_moe::{name}", "default", function)
    torch.library.register_fake(f"linear_moe::{name}", shapes)
torch.library.register_autograd("linear_moe::enter", _back_to_span, setup_context=_keep_memory)
torch.library.register_autograd("linear_moe::gather_tokens", _back_to_tokens, setup_context=_keep_group)
