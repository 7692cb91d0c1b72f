"""A second backend of kernels: flash-linear-attention's (fla-org/flash-linear-attention, fla-core), by thin adapters.

For the rows that it covers, and for comparisons (`bench.py kernels --peer fla`). The package is imported where it is
needed and is no requirement; nothing is replaced silently: what it lacks or refuses is said in one line. Everything is
passed explicitly, since defaults differ from operator to operator: scale 1 (queries come scaled), no normalisation of
queries and keys, the memory as b h k v in float32, and it is always returned.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import reference
from reference import span as spans
from reference.lsm import LSM
from reference.recurrence import Inputs, Memory, Row, check

Given = dict[str, Tensor]


def whole(x: Given, *names: str) -> Given:
    return {name: x[name] for name in names}


def slots_of(x: Given) -> Given:
    """Gated slot attention writes what its gates free."""
    return whole(x, "q", "k", "v", "g") | {"s": -torch.expm1(x["g"]).to(x["q"].dtype)}


def tied(x: Given) -> Given:
    return whole(x, "q", "v", "g") | {"k": -torch.expm1(x["g"]).to(x["q"].dtype)}


def two_memories(memory: Memory, x: Given) -> tuple[Tensor, Tensor]:
    """Slots' keys, turned, and slots' values."""
    keys, values = memory.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    return keys.mT.contiguous(), values.contiguous()


def one_memory(both: tuple[Tensor, Tensor]) -> Memory:
    return torch.cat([both[0].mT, both[1]], -1)


class Operator(NamedTuple):
    """An operator, and what it takes and gives where that differs from ours."""

    module: str  # of fla.ops
    function: str
    given: Callable[[Given], dict]  # the row's tokens and constants by its names
    into: Callable = lambda memory, x: memory
    back: Callable = lambda memory: memory
    renamed: tuple[tuple[str, str], ...] = ()  # what the operator for a few tokens calls otherwise

    def of_one_token(self) -> "Operator":
        """The token loop in one kernel, which the package has beside every operator in chunks."""
        return self._replace(function=self.function.replace("chunk_", "fused_recurrent_"), given=self.given_to_one)

    def given_to_one(self, x: Given) -> dict:
        names = dict(self.renamed)
        return {names.get(name, name): y for name, y in self.given(x).items()}


GATED_DELTA = Operator("gated_delta_rule", "chunk_gated_delta_rule", lambda x: whole(x, *"qkvg", "beta"))
OPERATOR = {
    "linear_attention": Operator("linear_attn", "chunk_linear_attn", lambda x: whole(x, *"qkv") | {"normalize": False}),
    "lightning": Operator("simple_gla", "chunk_simple_gla", lambda x: whole(x, *"qkv") | {"g_gamma": x["g"]}),
    "retention": Operator("simple_gla", "chunk_simple_gla", lambda x: whole(x, *"qkv") | {"g_gamma": x["g"]}),
    "mamba2": Operator("simple_gla", "chunk_simple_gla", lambda x: whole(x, *"qkvg")),
    "gla": Operator("gla", "chunk_gla", lambda x: whole(x, *"qkvg"), renamed=(("g", "gk"),)),
    "hgrn2": Operator("gla", "chunk_gla", tied, renamed=(("g", "gk"),)),
    "rwkv6": Operator("rwkv6", "chunk_rwkv6", lambda x: whole(x, *"kvu") | {"r": x["q"], "w": x["g"]}),
    "gsa": Operator("gsa", "chunk_gsa", slots_of, two_memories, one_memory),
    "delta_net": Operator("delta_rule", "chunk_delta_rule", lambda x: whole(x, *"qkv", "beta")),
    "gated_delta_net": GATED_DELTA,
    "gated_delta_product": GATED_DELTA,
    "comba": Operator("comba", "chunk_comba", lambda x: whole(x, *"qkvg", "beta") | {"p": x["a"]}),
    "kda": Operator("kda", "chunk_kda", lambda x: whole(x, *"qkvg", "beta")),
    "rwkv7": Operator("rwkv7", "chunk_rwkv7", lambda x: whole(x, *"kvab") | {"r": x["q"], "w": x["g"]}),
}


def rows() -> list[str]:
    """The rows that have an adapter."""
    return list(OPERATOR)


def adapter(name: str) -> Operator:
    """NotImplementedError, in one line, if there is none."""
    if name not in OPERATOR:
        raise NotImplementedError(
            f"flash-linear-attention has no operator for {name!r} here (have {', '.join(rows())})"
        )
    return OPERATOR[name]


def operator(how: Operator) -> Callable:
    """flash-linear-attention's. NotImplementedError, in one line, if it cannot be imported."""
    module, function = how[:2]
    try:
        return getattr(import_module(f"fla.ops.{module}"), function)
    except (ImportError, AttributeError) as error:  # without Triton it imports and exports nothing
        raise NotImplementedError(
            f"{function} of flash-linear-attention cannot be imported ({type(error).__name__}: {error}): "
            "pip install fla-core, or use the backend 'fast' or 'reference'"
        ) from None


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """As the reference's. NotImplementedError, in one line, for a row without an operator, or if it refuses."""
    constants = constants or {}
    check(row, tokens, constants, memory, cu_seqlens)
    return run(adapter(name_of(row)), {**tokens, **constants}, memory, cu_seqlens)


def step(row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None) -> tuple[Tensor, Memory]:
    """One token for each sequence, by the package's loop over tokens; with gradients wanted it is `recurrence` over it.

    The memory comes back as a new one.
    """
    constants = constants or {}
    check(row, tokens, constants, memory, None)
    how, x = adapter(name_of(row)), {**tokens, **constants}
    given = [*x.values(), *([] if memory is None else [memory])]
    wanted = torch.is_grad_enabled() and any(y.requires_grad for y in given)
    return run(how if wanted else how.of_one_token(), x, memory, None)


def name_of(row: Row) -> str:
    return next((name for name, other in LSM.items() if other == row), row.title)


def run(how: Operator, x: Given, memory, cu_seqlens) -> tuple[Tensor, Memory]:
    memory = None if memory is None else how.into(memory.float().contiguous(), x)
    borders = None if cu_seqlens is None else cu_seqlens.long()
    call = operator(how)
    o, last = call(**how.given(x), scale=1.0, initial_state=memory, output_final_state=True, cu_seqlens=borders)
    return o, how.back(last)


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> spans.Span:
    """`reference.span.span`, with these operators' run inside."""
    return spans.span(row, tokens, constants, cu_seqlens, run=recurrence)


ops = reference.ops._replace(
    name="fla",
    recurrence=recurrence,
    span=span,
    step=step,
    kept=tuple(
        name
        for name, f in reference.ops._asdict().items()
        if callable(f) and name not in ("recurrence", "span", "step")
    ),
    again=True,
)
