"""LASP: one long sequence cut over ranks. What travels is what a segment does to a memory, never its tokens.

    forward    (A_r, S_r) = span(my tokens);  gather (A, S);  M_0 = 0,  M_{r+1} = A_r ⋄ M_r + S_r;  run from M_r
    backward   G_r = what M_r receives from my outputs;  gather G;  D_{W-1} = 0,  D_r = G_{r+1} + A_{r+1}ᵀ ⋄ D_{r+1}
               dS_r = D_r,  dA_r = gradient of A ⋄ M at (D_r, M_r);  backward of span

One gather a layer and direction, of a size that does not know the sequence's length. This is LASP-2 (2502.07563) with
transitions: any row of the table, packed documents, segments of any length. A short convolution and a token shift are
spans as well: their memory is the last inputs, of which a segment pushes its own in and as many old ones out. Softmax
attention stands in `parallel.attention`.

Cut documents: in a segment's `cu_seqlens` a leading empty document, [0, 0, ...], says that the first token begins
another document. What comes in from earlier ranks belongs to document 0; all others start from zeros. Borders `l n1`
are those of l lines, one behind the other, that are all cut here (the memories of a mixture): each has a document 0 of
its own.

    W ranks   r this rank   T_r its tokens, any number, 0 too   b h k v as in `reference.recurrence`
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel import comm
from parallel.attention import ATTENTION, refuse, ulysses
from parallel.comm import Group
from parallel.graph import attached, differentiable, known, once
from reference.bidirectional import both_ways, reverse
from reference.documents import end_to_end
from reference.late import comes_late, left_of, seen
from reference.late import span as span_of_late
from reference.ops import Ops, observed
from reference.recurrence import check, prepare
from reference.span import TRANSITION, Span, brief, fold, fold_back, rebuilt, transition

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
    """The borders inside tokens [start, stop), counted from start: [0, 0, ...] if a document begins at start. (That the
    sequence's first token does, nobody need say: nothing comes before it, and kernels share themselves out by how many
    documents there are.)

    Empty documents have no token and are left out. A segment of no tokens has none to begin with either: [0, 0].
    """
    if not 0 <= start <= stop <= int(cu_seqlens[-1]):
        raise ValueError(f"segment [{start}, {stop}) does not lie in the {int(cu_seqlens[-1])} tokens of cu_seqlens")
    borders = cu_seqlens.unique()
    inside = borders[(borders >= max(start, 1)) & (borders < stop)]
    return torch.cat([cu_seqlens.new_tensor([start]), inside, cu_seqlens.new_tensor([stop])]) - start


# ---------------------------------------------------------------------------------------- the memory at the border


class Wire(NamedTuple):
    """How A travels: as it is, or as the few numbers that make it up with constants that every rank has (`brief`)."""

    numbers: Tensor
    constants: list[Tensor]
    name: str


def enter(span: Span, group: Group) -> Float[Tensor, "b h k v"]:
    """The memory before my segment, from every rank's span; differentiable in S (A is made of borders).

    One gather forward, of (A, S), and one backward, of the memories' cotangents, on every rank: the first takes part
    though nothing comes before it, the last though nothing comes after. A rank that stayed away would meet the others
    in the next layer's gather. A block that runs again finds what it gathered.
    """
    if observed():
        wire = wire_of(span, [None])
        return arrived(departed(span, wire, group), span, wire, group)
    return _Entered.apply(span.S, span.A, *once(partial(entering, span, group)), span.kind, group)


def entering(span: Span, group: Group) -> tuple[Tensor, Tensor]:
    """All ranks' spans, and the memory before my segment: at once, past torch's operators, where nobody looks on."""
    how = *wire_of(span, [None]), span.kind, False, group.group_name
    underway = _depart(span.A, span.S, *how)
    return underway, _arrive(underway, span.A, span.S, *how)


class _Entered(torch.autograd.Function):
    """M, which enters my segment, from all ranks' spans, which stand in `underway`. By way of torch's own operators the
    host would need several times as long."""

    @staticmethod
    def forward(ctx, S, A, underway, M, kind, group):
        ctx.kind, ctx.group = kind, group
        ctx.save_for_backward(A, underway)
        return M.view_as(M)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        A, underway = ctx.saved_tensors
        return leaving(G.contiguous(), underway, A, ctx.kind, ctx.group), *[None] * 5


def departed(span: Span, wire: Wire, group: Group, both: bool = False) -> Float[Tensor, " n"]:
    """Sends my span on its way. What comes back is a buffer for `arrived`, into which nobody else may look; work
    between the two hides the gather. Backward mirrors it: `arrived` sends the cotangents, `departed` waits for them."""
    return torch.ops.linear_moe.depart(span.A, span.S, *wire, span.kind, both, group.group_name)


def arrived(underway: Tensor, span: Span, wire: Wire, group: Group, both: bool = False) -> Float[Tensor, "b h k v"]:
    """The memory before my segment. `both`: the second half of the batch runs from the last rank to the first."""
    return torch.ops.linear_moe.arrive(underway, span.A, span.S, *wire, span.kind, both, group.group_name)


def each_way(parts: Sequence[tuple[Tensor, ...]], me: int, both: bool) -> list[tuple[Sequence, int]]:
    """Of each way all ranks' parts in the order of its run, and my place among them."""
    if not both:
        return [(parts, me)]
    there, back = zip(*(zip(*(x.chunk(2) for x in part), strict=True) for part in parts), strict=True)
    return [(there, me), (back[::-1], len(parts) - 1 - me)]


def _depart(A, S, numbers, constants, name, kind, both, group):
    mine = torch.cat([numbers.flatten().to(S.dtype), S.flatten()])
    group = comm.named(group)
    underway = mine.new_empty(comm.size(group) * mine.numel())
    comm.begin_gather(mine, underway, group)
    return underway


def _arrive(underway, A, S, numbers, constants, name, kind, both, group):
    comm.end_gather(underway)
    with torch.autocast(S.device.type, enabled=False):
        parts = spans_of(underway, A, S, numbers, constants, name)
        memories = []
        for spans, me in each_way(parts, comm.rank(comm.named(group)), both):
            before = [Span(*span, kind) for span in spans[:me]]
            memories.append(fold(before, torch.zeros_like(spans[me][1]))[-1])
        return torch.cat(memories) if both else memories[0]


def _depart_back(G: Tensor, underway: Tensor, group: str) -> Tensor:
    """Sends G, what the memory before my segment receives from my outputs, in a buffer of the same size as forward: it
    is what autograd takes for the buffer's gradient."""
    returning = torch.empty_like(underway)
    comm.begin_gather(G.to(underway.dtype), returning, comm.named(group))
    return returning


def _arrive_back(returning, underway, A, S, numbers, constants, name, kind, both, group):
    """(dA, dS)."""
    group, dA, dS = comm.named(group), [], []
    Gs = returned(returning, S, group)
    with torch.autocast(S.device.type, enabled=False):
        parts = spans_of(underway, A, S, numbers, constants, name)
        parts = [(*span, G) for span, G in zip(parts, Gs, strict=True)]
        for ordered, me in each_way(parts, comm.rank(group), both):
            spans, (*_, G) = [Span(*part[:2], kind) for part in ordered], zip(*ordered, strict=True)
            nothing = torch.zeros_like(G[me])
            M = fold(spans[:me], nothing)[-1]
            D = fold_back(spans[me + 1 :], G[me + 1 :], nothing)[0]
            dA.append(gradient_of_transition(kind, spans[me].A, D, M))
            dS.append(D)
    return torch.cat(dA).to(A.dtype), torch.cat(dS)  # an op's output may not be a piece of the buffer


def returned(returning: Tensor, like: Tensor, group: Group) -> Sequence[Tensor]:
    """Every rank's G, each as large as `like`, from the buffer, when they are there."""
    comm.end_gather(returning)
    return returning[: comm.size(group) * like.numel()].view(-1, *like.shape).unbind()


def spans_of(underway, A, S, numbers, constants, name) -> list[tuple[Tensor, Tensor]]:
    """Every rank's A and S, from the buffer."""
    spans = []
    for part in underway.view(-1, numbers.numel() + S.numel()).unbind():
        theirs, own = part.split([numbers.numel(), S.numel()])
        theirs = rebuilt(theirs.view(numbers.shape), constants, name) if name else theirs.view(A.shape)
        spans.append((theirs, own.view(S.shape)))
    return spans


def gradient_of_transition(kind: str, A: Tensor, D: Tensor, M: Tensor) -> Tensor:
    """dA, from A, D, the cotangent of the memory that leaves my segment, and M, the memory that enters it."""
    return TRANSITION[kind].gradient(A, D, M)


def _depart_shapes(A, S, numbers, constants, name, kind, both, group):
    return S.new_empty(comm.size(comm.named(group)) * (numbers.numel() + S.numel()))


def _keep_departed(ctx, inputs, output):
    A, S, numbers, constants, *ctx.words = inputs
    ctx.save_for_backward(output, A, S, numbers, *constants)


def _back_to_span(ctx, returning):
    underway, A, S, numbers, *constants = ctx.saved_tensors
    dA, dS = torch.ops.linear_moe.arrive_back(returning, underway, A, S, numbers, constants, *ctx.words)
    return dA if ctx.needs_input_grad[0] else None, dS, None, [None] * len(constants), *[None] * 4


def _keep_arrived(ctx, inputs, output):
    ctx.constants, ctx.group = len(inputs[4]), inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[2])


def _back_to_departed(ctx, G):
    underway, S = ctx.saved_tensors
    G = torch.zeros_like(S) if G is None else G.contiguous()
    returning = torch.ops.linear_moe.depart_back(G, underway, ctx.group)
    return returning, None, None, None, [None] * ctx.constants, *[None] * 4


# ------------------------------------------------------------------------------------------------------- the ops


def over(ops: Ops, group: Group, attention: str = "gather", how: str = "gather") -> Ops:
    """The same ops for a sequence cut over the ranks of `group`, in rank order.

    `attention` says how softmax layers see other ranks' tokens (`parallel.attention`), `how` how memories travel: all
    at once as spans, or from rank to rank (`chain`). For training: an op that is given a state raises ValueError. So
    does, here and in one line, a field of `ops` that nobody has said how to cut, or a name that is not known.
    """
    chosen = {"attention": known_as("attention", attention, ATTENTION), "recurrence": known_as("states", how, STATES)}
    if comm.size(group) == 1:
        return ops
    cut = CUT | chosen
    for name in ops._fields:
        if name not in cut and name not in WHOLE:
            raise ValueError(f"cannot cut ops.{name} over a sequence: expected one of {', '.join((*cut, *WHOLE))}")
    if ops.one_way is not None:
        return over_both_ways(ops, group, attention, how)
    name = f"{ops.name} over {comm.size(group)} ranks of a sequence"
    return ops._replace(name=name, cut=True, **{name: make(ops, group) for name, make in cut.items()})


def over_both_ways(ops: Ops, group: Group, attention: str, how: str) -> Ops:
    """Of ops that look both ways: what ranks before mine do to the memory, and what those behind it do to that of the
    reversed sequence, come in one gather a layer and direction. Softmax attention exchanges tokens for heads, for then
    each rank sees all of them; the other ways are causal."""
    check_both_ways(False, attention, how)

    def run(row, tokens, constants, cu_seqlens):
        there, back = runs(ops.one_way, group, row, [(tokens, cu_seqlens), reverse(tokens, cu_seqlens)], constants)
        return there[0] + back[0].flip(1)

    both = both_ways(over(ops.one_way, group, attention), run)
    return both._replace(attention=ulysses(ops, group) if attention == "ulysses" else causal_only(attention))


def causal_only(way: str) -> Callable:
    return lambda *_, **__: check_both_ways(True, way, "gather")


def check_both_ways(softmax: bool, attention: str, how: str) -> None:
    """ValueError, one line, for what knows one direction: ways of memories, and of softmax layers, if there are any."""
    if how != "gather":
        raise ValueError(f"ops that look both ways cannot be cut with states {how}: use gather")
    if softmax and attention != "ulysses":
        raise ValueError(
            f"{attention} attention over a cut sequence is causal: ops that look both ways need ulysses "
            "(--mesh.attention ulysses)"
        )


def known_as(what: str, name: str, table: dict[str, Callable]) -> Callable:
    if name not in table:
        raise ValueError(f"unknown way {name!r} for {what} over a cut sequence: expected one of {', '.join(table)}")
    return table[name]


def recurrence(ops: Ops, group: Group) -> Callable:
    """One gather each way. Receives (W - 1)(bytes of A and S) forward, (W - 1)(bytes of S) backward. The memory that
    it returns is the one that leaves my segment."""

    def run(row, tokens, constants=None, memory=None, cu_seqlens=None):
        refuse("recurrence", memory)
        if transition(row) is None:
            raise ValueError(
                f"{row.title} is not affine in its memory: its segments have no spans to gather; let memories go from "
                "rank to rank (states ring, serial), use another row, or keep sequences whole"
            )
        return runs(ops, group, row, [(tokens, cu_seqlens)], constants or {})[0]

    return run


def runs(ops: Ops, group: Group, row, ways: list[tuple[dict, Tensor | None]], constants: dict) -> list[tuple]:
    """(outputs, last memory) of my tokens, and of my tokens in reverse, if there is a second way; one gather for both.

    Where a memory adds to the outputs (`reference.late`) the tokens run once, from nothing, while the gather is under
    way, and what enters is added afterwards; the backward pass mirrors that. Other rows run for their span and again
    from the memory: a delta rule would have to carry a K×K matrix to each token, an element's own decay K×V numbers. So
    do all rows where that is less work than the addition, which is plain PyTorch in float32 (`ops.again`: by kernels).
    """
    both, one = len(ways) > 1, lines(ways[0][1]) == 1
    if ops.ends is not None and not observed() and one and not both and ops.ends.takes(row, ways[0][0]):
        return [by_ends(ops, group, row, *ways[0], constants)]
    inputs, late = [*ways[0][0].values(), *constants.values()], one and comes_late(row) and not ops.again
    span_of = span_of_late if late else partial(span_of_lines, ops)
    span = side_by_side([span_of(row, tokens, constants, cu) for tokens, cu in ways])
    span = span._replace(S=attached(span.S, [], inputs))
    wire = wire_of(span, [brief(row, tokens, constants, cu) if one else None for tokens, cu in ways])
    underway = departed(span, wire, group, both)
    alone = [ops.recurrence(row, tokens, constants, None, cu) if late else None for tokens, cu in ways]
    memories = arrived(underway, span, wire, group, both).chunk(len(ways))
    found = []
    for (tokens, cu), M, own in zip(ways, memories, alone, strict=True):
        if late:
            first = tokens_of_first(tokens, cu)
            o = added(own[0], seen(row, first, constants, M))
            last = own[1] + for_first(left_of(row, first, constants, M), cu)
        else:
            o, last = ops.recurrence(row, tokens, constants, for_first(M, cu), end_to_end(cu))
        found.append((attached(o, [M], inputs), last))
    return found


def by_ends(ops: Ops, group: Group, row, tokens: dict, cu_seqlens, constants: dict) -> tuple[Tensor, Tensor]:
    """The same of one way, where kernels find spans and G without outputs: nothing runs twice. The span needs no
    gradient: `last`, the memory that leaves my segment, has D for its cotangent, and the backward pass of the one run
    from M to `last` has all that my tokens did, to outputs and to memories."""
    tokens = {name: x.contiguous() for name, x in tokens.items()}  # once, where three would do it

    def found() -> tuple:
        span, kept = ops.ends.span(row, tokens, constants, cu_seqlens)
        underway, M = entering(span, group)
        return span, kept, underway, for_first(M, cu_seqlens)

    span, kept, underway, M = once(found)
    o, last = ops.recurrence(row, tokens, constants, M, cu_seqlens)
    inputs = [*tokens.values(), *constants.values()]
    o = o if o.numel() else attached(o, [], inputs)
    call = (ops.ends.received, row, list(tokens), list(constants), span.kind, group)
    return _Left.apply(o, last, call, cu_seqlens, underway, span.A, kept, *inputs), last


class _Left(torch.autograd.Function):
    """o. On the way back all ranks exchange what their first memories receive from their o (G), and `last` gets D."""

    @staticmethod
    def forward(ctx, o, last, call, cu_seqlens, underway, A, kept, *inputs):
        ctx.call, ctx.kept = call, len(kept)
        ctx.save_for_backward(cu_seqlens, underway, A, *kept, *inputs)
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        cu_seqlens, underway, A, *rest = ctx.saved_tensors
        received, row, names, constants, kind, group = ctx.call
        kept, tokens, constants = parted(rest, ctx.kept, names, constants)
        G = received(row, tokens, constants, do, cu_seqlens, kept)
        own = G if cu_seqlens is None else G[:1]
        D = leaving(own.contiguous(), underway, A, kind, group)
        if len(G) > len(own):
            D = torch.cat([torch.zeros_like(G[1:]), D])
        return do, D, *[None] * (5 + len(tokens) + len(constants))


def parted(tensors: list[Tensor], kept: int, tokens: list[str], constants: list[str]) -> tuple[list, dict, dict]:
    """What was saved in one line: what is kept, tokens and constants by name."""
    shared = kept + len(tokens)
    return (
        tensors[:kept],
        dict(zip(tokens, tensors[kept:shared], strict=True)),
        dict(zip(constants, tensors[shared:], strict=True)),
    )


def leaving(G: Tensor, underway: Tensor, A: Tensor, kind: str, group: Group) -> Tensor:
    """D, what the memory that leaves my segment receives from the ranks behind it, from everybody's G; all ranks' spans
    stand in `underway`."""
    Gs = returned(_depart_back(G, underway, group.group_name), G, group)
    with torch.autocast(G.device.type, enabled=False):
        spans = [Span(*span, kind) for span in spans_of(underway, A, G, A, [], "")]
        later = comm.rank(group) + 1
        return fold_back(spans[later:], Gs[later:], torch.zeros_like(G))[0]


def side_by_side(spans: list[Span]) -> Span:
    """As one, of so many times the batch."""
    if len(spans) == 1:
        return spans[0]
    return Span(*(torch.cat(xs) for xs in zip(*(span[:2] for span in spans), strict=True)), spans[0].kind)


def wire_of(span: Span, briefs: list) -> Wire:
    if briefs[0] is None:
        return Wire(span.A, [], "")
    return Wire(torch.cat([numbers for numbers, *_ in briefs]), *briefs[0][1:])


def span_of_lines(ops: Ops, row, tokens, constants, cu_seqlens) -> Span:
    """`ops.span`, of each line if there are several."""
    if lines(cu_seqlens) == 1:
        return ops.span(row, tokens, constants, end_to_end(cu_seqlens))
    spans = []
    for borders in cu_seqlens.cpu():
        own = {name: x[:, borders[0] : borders[-1]] for name, x in tokens.items()}
        spans.append(ops.span(row, own, constants, (borders - borders[0]).to(cu_seqlens.device)))
    A, S, kind = zip(*spans, strict=True)
    return Span(torch.cat(A), torch.cat(S), kind[0])


def tokens_of_first(tokens: dict[str, Tensor], cu_seqlens) -> dict[str, Tensor]:
    """Those of document 0, whom what enters my segment belongs to."""
    if cu_seqlens is None:
        return tokens
    return {name: x[:, : int(cu_seqlens[1])] for name, x in tokens.items()}


def added(o: Float[Tensor, "b t h v"], more: Float[Tensor, "b s h v"]) -> Float[Tensor, "b t h v"]:
    """o, to whose first s tokens more is added, in the precision of what is added."""
    s = more.shape[1]
    return torch.cat([(o[:, :s].to(more.dtype) + more).to(o.dtype), o[:, s:]], 1)


def chain(ops: Ops, group: Group) -> Callable:
    """LASP-1 (2404.02882): take the memory from the rank before, run, give it to the rank after; backward the cotangent
    goes the other way. A rank receives the bytes of one memory each way, but all wait for each other in turn.

    Any row will do, affine or not. For teaching, for rows that have no span, and as what the gather is measured by.
    """

    def run(row, tokens, constants=None, memory=None, cu_seqlens=None):
        refuse("recurrence", memory)
        constants = constants or {}
        borders = end_to_end(cu_seqlens)
        check(row, tokens, constants, None, borders)
        nothing = prepare(row, tokens, constants, None, None)[-1]
        nothing = nothing.repeat(lines(cu_seqlens), 1, 1, 1)
        inputs = [*tokens.values(), *constants.values()]
        # a constant that my tokens do not use gets a gradient of zeros, not none
        nothing = nothing + 0 * sum(x.sum() for x in constants.values())
        M = torch.ops.linear_moe.take_memory(attached(nothing, [], inputs), group.group_name)
        o, last = ops.recurrence(row, tokens, constants, for_first(M, cu_seqlens), borders)
        given = torch.ops.linear_moe.give_memory(of_last(last, cu_seqlens), group.group_name)
        return attached(o, [given, M], inputs), last

    return run


def _take_memory(like: Tensor, group: str) -> Tensor:
    return comm.take(like, comm.named(group))


def _give_memory(M: Tensor, group: str) -> Tensor:
    """Nothing, on which outputs may depend: the backward pass then begins by taking the memory's cotangent."""
    comm.give(M, comm.named(group))
    return M.new_zeros(0)


def _take_cotangent(like: Tensor, group: str) -> Tensor:
    return comm.take(like, comm.named(group), -1)


def _give_cotangent(D: Tensor, group: str) -> Tensor:
    comm.give(D, comm.named(group), -1)
    return torch.zeros_like(D)


def _keep_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _keep_given(ctx, inputs, output):
    ctx.group = inputs[1]
    ctx.save_for_backward(inputs[0])


def _back_to_taken(ctx, D):
    return torch.ops.linear_moe.give_cotangent(D, ctx.group), None


def _back_to_given(ctx, _):
    return torch.ops.linear_moe.take_cotangent(ctx.saved_tensors[0], ctx.group), None


def short_convolution(ops: Ops, group: Group) -> Callable:
    """One gather each way, of the last w - 1 inputs and, forward, (w - 1)² numbers that say how far they move."""

    def run(x, weight, bias=None, activation=None, taps=None, cu_seqlens=None):
        refuse("short_convolution", taps)
        if weight.shape[-1] == 1:
            return ops.short_convolution(x, weight, bias, activation, None, end_to_end(cu_seqlens))
        reach = weight.shape[-1] - 1
        if replaces(x, reach, cu_seqlens):
            x, last = _WithLast.apply(x, reach)
            span = pushed_out(last, x.shape[1], cu_seqlens)
        else:
            span = window(x, reach, cu_seqlens)
        before = enter(span, group)
        first = for_first(before[:, 0], cu_seqlens)
        y, taps = ops.short_convolution(x, weight, bias, activation, first, end_to_end(cu_seqlens))
        return attached(y, [before], [x, weight, bias]), taps

    return run


class _WithLast(torch.autograd.Function):
    """x, and its last n tokens, whose gradient is added to that of x in place: this is the convolution's own, which
    nobody else has, and torch's sum of two gradients would be four passes over all of x for a few tokens."""

    @staticmethod
    def forward(ctx, x, n):
        return x.view_as(x), x[:, x.shape[1] - n :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dlast):
        dx[:, dx.shape[1] - dlast.shape[1] :] += dlast
        return dx, None


def token_shift(ops: Ops, group: Group) -> Callable:
    """One gather each way, of the last input and, forward, one number."""

    def run(x, last=None, cu_seqlens=None):
        refuse("token_shift", last)
        before = enter(window(x, 1, cu_seqlens), group)
        y, last = ops.token_shift(x, for_first(before[:, 0, 0], cu_seqlens), end_to_end(cu_seqlens))
        return attached(y, [before], [x]), last

    return run


def running_sum(ops: Ops, group: Group) -> Callable:
    """One gather each way, of a segment's sum and, forward, one number a sequence. A sum is a memory that keeps."""

    def run(x, last=None, cu_seqlens=None):
        refuse("running_sum", last)
        borders = end_to_end(cu_seqlens)
        S = of_last(attached(ops.running_sum(x, None, borders)[1], [], [x]), cu_seqlens)[:, None, None]
        whole = cu_seqlens is None or cu_seqlens.shape[-1] == 2  # else only the last document goes on
        before = enter(Span(S.new_full(S.shape[:2], float(whole)), S, "scalar"), group)
        y, last = ops.running_sum(x, for_first(before[:, 0, 0], cu_seqlens), borders)
        return attached(y, [before], [x]), last

    return run


def window(x: Float[Tensor, "b t c"], reach: int, cu_seqlens) -> Span:
    """What a segment does to the last `reach` inputs: they move up by T_r places, and its own follow.

    A span like any other, of one head, with places for key channels: A is 1 where an old input moves to. Segments
    shorter than `reach`, and empty ones, pass on what they got.
    """
    t = x.shape[1]
    if replaces(x, reach, cu_seqlens):
        return pushed_out(x[:, t - reach :], t, cu_seqlens)
    if cu_seqlens is None:
        A, S = torch.diag(x.new_ones(reach - t), t), F.pad(x, (0, 0, reach - t, 0))
        return Span(A.expand(len(x), 1, reach, reach), S[:, None], "matrix")
    documents = cu_seqlens.view(-1, cu_seqlens.shape[-1]).long()
    start, stop, place = documents[:, -2, None], documents[:, -1, None], torch.arange(reach, device=x.device)
    source = stop - reach + place
    S = F.pad(x[0], (0, 0, reach, 0))[(source + reach)].where((source >= start)[..., None], 0)
    moved = place == place[:, None] + (stop - start)[..., None]
    A = (moved & (documents.shape[1] == 2)).to(x.dtype)  # a border: only the last document goes on
    return Span(A[:, None], S[:, None], "matrix")


def replaces(x: Float[Tensor, "b t c"], reach: int, cu_seqlens) -> bool:
    """Whether a segment surely leaves nothing of what it got: `pushed_out`."""
    return x.shape[1] >= reach and lines(cu_seqlens) == 1


def pushed_out(last: Float[Tensor, "b w c"], t: int, cu_seqlens) -> Span:
    """`window` of a segment of t tokens, no fewer than w, of which these are the last; A is 0."""
    b, w, _ = last.shape
    if cu_seqlens is not None and cu_seqlens.shape[-1] > 2:  # those of the last document
        last = last.where((torch.arange(t - w, t, device=last.device) >= cu_seqlens.flatten()[-2])[:, None], 0)
    return Span(last.new_zeros(b, 1, w, w), last[:, None], "matrix")


def lines(cu_seqlens) -> int:
    """How many sequences lie one behind the other."""
    return 1 if cu_seqlens is None or cu_seqlens.ndim == 1 else len(cu_seqlens)


def for_first(state: Float[Tensor, "b ..."], cu_seqlens) -> Float[Tensor, "n ..."]:
    """The state that comes in is document 0's, line by line; the others start from zeros."""
    if cu_seqlens is None or cu_seqlens.shape[-1] == 2:
        return state
    others = state.new_zeros(len(state), cu_seqlens.shape[-1] - 2, *state.shape[1:])
    return torch.cat([state[:, None], others], 1).flatten(0, 1)


def of_last(states: Float[Tensor, "n ..."], cu_seqlens) -> Float[Tensor, "b ..."]:
    """What goes on: the state of the last document, line by line."""
    return states if cu_seqlens is None else states.unflatten(0, (lines(cu_seqlens), -1))[:, -1]


STATES = {"gather": recurrence, "ring": chain}
CUT = {"short_convolution": short_convolution, "token_shift": token_shift, "running_sum": running_sum}
# Acts on each token alone, is about my own tokens by definition, or belongs to the mesh (total).
WHOLE = (
    "name",
    "span",
    "step",
    "top",
    "by_expert",
    "experts",
    "taken",
    "combined",
    "linears",
    "norm",
    "unit",
    "elu_plus_one",
    "token_losses",
    "total",
    "kept",
    "one_way",
    "cut",
    "again",
    "ends",
)

# ------------------------------------------------------------------------------------------------ known to torch

SPAN = "Tensor A, Tensor S, Tensor numbers, Tensor[] constants, str name, str kind, bool both, str group"
known("depart", f"({SPAN}) -> Tensor", _depart, _depart_shapes)
known("arrive", f"(Tensor underway, {SPAN}) -> Tensor", _arrive, lambda underway, A, S, *_: torch.empty_like(S))
known(
    "depart_back", "(Tensor G, Tensor underway, str group) -> Tensor", _depart_back, lambda G, x, _: torch.empty_like(x)
)
known(
    "arrive_back",
    f"(Tensor returning, Tensor underway, {SPAN}) -> (Tensor, Tensor)",
    _arrive_back,
    lambda returning, underway, A, S, *_: (torch.empty_like(A), torch.empty_like(S)),
)
differentiable("depart", _back_to_span, _keep_departed)
differentiable("arrive", _back_to_departed, _keep_arrived)

MEMORY = "(Tensor memory, str group) -> Tensor"
known("take_memory", MEMORY, _take_memory, lambda M, _: torch.empty_like(M))
known("give_memory", MEMORY, _give_memory, lambda M, _: M.new_empty(0))
known("take_cotangent", MEMORY, _take_cotangent, lambda M, _: torch.empty_like(M))
known("give_cotangent", MEMORY, _give_cotangent, lambda D, _: torch.empty_like(D))
differentiable("take_memory", _back_to_taken, _keep_group)
differentiable("give_memory", _back_to_given, _keep_given)
