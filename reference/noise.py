"""Randomness that is a function: of a key, a token's number in the whole run, and a channel.

No result depends on the rank, the micro-batch, the order of calls or recomputation. `seed_of` makes keys.

    b batch   t time   d channels
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def dropout(x: Float[Tensor, "b t d"], share: float, key: int, index: Int[Tensor, "b t"]) -> Tensor:
    """Zero a `share` of x and scale up the rest, by a hash of (key, token's number, channel): no ranks, no order."""
    draw = noise(key, index, x.shape[-1])
    return torch.where(draw < share, 0.0, x / (1 - share)).to(x.dtype)


def noise(key: int, index: Int[Tensor, "b t"], width: int) -> Float[Tensor, "b t d"]:
    """Even in [0, 1), 24 bits: the splitmix64 finaliser of each counter (Steele et al., OOPSLA 2014)."""
    z = index[..., None] * width + torch.arange(width, device=index.device)
    z = z + wrapped(key * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ shifted(z, shift)) * wrapped(factor)
    return (shifted(z ^ shifted(z, 31), 40)).float() * 2.0**-24


def wrapped(x: int) -> int:
    """x modulo 2^64 as a signed 64-bit number, in which torch multiplies."""
    return (x + 2**63) % 2**64 - 2**63


def shifted(x: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def seed_of(*what) -> int:
    """63 bits that depend on all of `what`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1
