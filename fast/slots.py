"""Gated slot attention: what queries find among slots' keys weighs slots' values. Two memories, two families."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast import channel, scan
from fast.kernels.scan import COLUMN
from fast.operators import even
from reference import recurrence as words
from reference.normal import Normal
from reference.recurrence import Inputs, Row

LARGEST = 256  # keys, values and slots


class Slots(NamedTuple):
    """With s = 1 - e^g:  K_t = K_{t-1} e^g + k_tᵀ s_t (the columns fade), p_t = softmax(q_t K_t),
    V_t = e^g V_{t-1} + s_tᵀ v_t (the rows do), o_t = p_t V_t. The memory is [Kᵀ V]."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    g: Float[Tensor, "b t h m"]

    @staticmethod
    def finish(o: Tensor) -> Tensor:
        return o


def has_form(row: Row) -> bool:
    return row[:3] == (words.channel, words.slots, words.attended)


def form(row: Row, x: Inputs) -> Slots:
    return Slots(**x)


def takes(x) -> bool:
    return isinstance(x, Slots)


def fits(title: str, x: Slots) -> None:
    sizes = {"K": x.k.shape[-1], "V": x.v.shape[-1], "m": x.g.shape[-1]}
    if max(sizes.values()) > LARGEST:
        said = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(f"{title}: {said}, fast kernels take at most {LARGEST}; use the backend 'reference'")


def keys_of(x: Slots, written: Tensor) -> scan.Elements:
    """The first memory. What is written to it stays float32, and so does what is read: it goes into an exponent."""
    return scan.Elements(COLUMN.value, written, x.q, x.k, columns=x.g)


def run(x: Slots, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    K, V, m = x.k.shape[-1], x.v.shape[-1], x.g.shape[-1]
    keys, values = (None, None) if memory is None else memory.split([K, V], -1)
    written = -torch.expm1(x.g)
    found, keys = scan.run(keys_of(x, written), None if keys is None else keys.mT, cu_seqlens, sequences, True)
    q, k = (even(y.to(x.v.dtype)) for y in (found.softmax(-1), written))
    values = None if values is None else even(values, -m % 16)
    second = Normal(q, k, even(x.v), None, g=even(x.g))
    o, values = channel.run(second, values, cu_seqlens, sequences, False)
    return o[..., :V], torch.cat([keys.mT, values[..., :m, :V]], -1)


def step(x: Slots, memory: Tensor) -> Tensor:
    keys, values = (y.contiguous() for y in memory.split([x.k.shape[-1], x.v.shape[-1]], -1))
    keys, written = keys.mT.contiguous(), -torch.expm1(x.g)
    q = scan.step(keys_of(x, written), keys).softmax(-1).to(x.v.dtype)
    k, v, g = (y[:, 0].contiguous() for y in (written.to(x.v.dtype), x.v, x.g))
    o = channel.step(Normal(q, k, v, None, g=g), values)
    memory.copy_(torch.cat([keys.mT, values], -1))
    return o
