"""What a published layer costs: its parameters, what it keeps of a text, and the operations of its recurrence.

Operations are counted op by op while the layer runs, without its projections: 2mnk for a product of matrices, one a
number for whatever else computes, nothing for what moves, chooses or makes numbers.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from docs import tables
from reference.chunked import CHUNK
from reference.model import state_bytes
from reference.ops import ops
from reference.recurrence import empty

# operators that solve a system of n equations for m right sides -> operations
SOLVED = {
    "linalg_solve_triangular": lambda n, m: n * n * m,
    "_linalg_solve_ex": lambda n, m: 2 * n**3 // 3 + 2 * n * n * m,
    "linalg_lu_solve": lambda n, m: 2 * n * n * m,
}
REDUCED = ("sum", "mean", "cumsum", "amax", "max", "_softmax", "_softmax_backward_data")


class Operations(TorchDispatchMode):
    """Counts what is computed under it, forward and backward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.total += operations(function, args, kwargs or {}, out)
        return out


def operations(function, args, kwargs, out) -> int:
    """Those of one operator."""
    from torch.utils.flop_counter import flop_registry  # which loads triton, if there is one

    name, packet = function._overloadpacket.__name__, function._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    if name in SOLVED:
        n = args[0].shape[-1]
        systems = args[0].numel() // n**2
        return systems * SOLVED[name](n, results[0].numel() // (systems * n))
    computes = name in REDUCED or (torch.Tag.pointwise in function.tags and name != "clone")
    if not (computes and results):
        return 0
    return max(x.numel() for x in (results[0], *args) if isinstance(x, Tensor))


class Layer(NamedTuple):
    """What a published layer has, keeps of a text, and computes a token."""

    parameters: int
    bytes: int
    training: int
    decoding: int


@functools.cache
@torch.no_grad()
def layer(name: str) -> Layer:
    """Measured: a chunk in the middle of a text, forward and backward (one head, times the heads), and a step.

    So there is a gradient of the memory behind the chunk, and one for the memory before it.
    """
    counts = {"recurrence": 0, "step": 0}

    def recurrence(row, tokens, constants=None, memory=None, cu_seqlens=None):
        heads = tokens["v"].shape[2]
        tokens, constants = one_head(tokens, row.tokens), one_head(constants or {}, row.constants)
        memory = empty(row, tokens, constants, None if cu_seqlens is None else len(cu_seqlens) - 1).requires_grad_()
        leaves = [memory, *(x for x in (*tokens.values(), *constants.values()) if x.requires_grad)]
        with torch.enable_grad(), Operations() as counter:
            results = o, memory = ops.recurrence(row, tokens, constants, memory, cu_seqlens)
            if o.numel():  # a memory that no token visits costs nothing
                torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results], allow_unused=True)
        counts["recurrence"] += counter.total * heads
        return o.detach().expand(-1, -1, heads, -1), memory.detach().expand(-1, heads, -1, -1)

    def step(*inputs):
        with Operations() as counter:
            out = ops.step(*inputs)
        counts["step"] += counter.total
        return out

    model = tables.published(name, ops._replace(recurrence=recurrence, step=step))
    tokens = torch.zeros(1, CHUNK, dtype=torch.int64)
    state = model(tokens, keep_state=True).state
    model(tokens[:, :1], state=state)
    weights = [*model.common.values(), *model.blocks[0].sublayers[0].inner.parameters()]
    size = sum(weight.numel() for weight in weights)
    return Layer(size, state_bytes(state.mixers), counts["recurrence"] // CHUNK, counts["step"])


def one_head(inputs: Mapping[str, Tensor], shapes: Mapping[str, str]) -> dict[str, Tensor]:
    """The first head of each, as leaves."""
    axes = {n: shapes[n].split().index("h") for n in inputs if "h" in shapes[n].split()}
    parts = {n: x.narrow(axes[n], 0, 1) if n in axes else x for n, x in inputs.items()}
    return {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in parts.items()}
