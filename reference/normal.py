"""The words, unrolled: what each contributes when many tokens are taken at once.

Most rows have one normal form, from which the chunk form and the kernels start; a new row of the same words needs
nothing more.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reference import printed
from reference import recurrence as words
from reference.recurrence import Inputs, Row, featured, over_count, with_one


class Normal(NamedTuple):
    """M_t = e^g M_{t-1} e^f + kᵀ v, e^g for the rows of the memory and e^f for its columns; o = finish(q M_t).

    A delta rule has beta: with M̂ = e^g M_{t-1}, M_t = M̂ + beta kᵀ (v - k M̂), or (v - a M_{t-1}) if it has a.
    With a and b instead, M_t = M̂ + bᵀ (a M_{t-1}) + kᵀ v.
    With u the read is exclusive: o = q M_{t-1} + (q u . k) v.
    """

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    finish: Callable[[Tensor], Tensor] | None  # None: whoever made it finishes
    g: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None
    f: Float[Tensor, "b t h v"] | None = None
    beta: Float[Tensor, "b t h"] | None = None
    a: Float[Tensor, "b t h k"] | None = None
    b: Float[Tensor, "b t h k"] | None = None
    u: Float[Tensor, "h k"] | None = None


FORGOTTEN = {
    words.keep: lambda x: {},
    words.fixed: lambda x: {"g": x["g"].expand(x["v"].shape[:3])},
    words.scalar: lambda x: {"g": x["g"]},
    words.channel: lambda x: {"g": x["g"]},
    words.cross: lambda x: {"g": x["g"], "f": x["f"]},
    printed.timed: lambda x: {"g": x["A"] * x["beta"]},
}
WRITTEN = {
    words.outer: lambda x: {"k": x["k"], "v": x["v"]},
    words.counted: lambda x: {"k": x["k"], "v": with_one(x["v"])},
    words.tied: lambda x: {"k": -torch.expm1(x["g"]), "v": x["v"]},
    words.delta: lambda x: {"k": x["k"], "v": x["v"], "beta": x["beta"]},
    words.foresight: lambda x: {"k": x["k"], "v": x["v"], "beta": x["beta"], "a": x["a"]},
    words.replace: lambda x: {"k": x["k"], "v": x["v"], "a": x["a"], "b": x["b"]},
    printed.weighed: lambda x: {"k": x["beta"][..., None] * x["k"], "v": x["v"]},
    printed.independent: lambda x: {
        "k": x["beta"][..., None] * x["k"],
        "v": x["v"],
        "a": -x["k"] * (x["g"].exp()[..., None] if "g" in x else 1.0),
        "b": x["k"] * (x["alpha"][..., None] if "alpha" in x else 1.0),
    },
    printed.ascent: lambda x: {"k": x["k"], "v": x["v"], "beta": -x["beta"], "a": x["k"]},
}
ASKED = {
    words.inclusive: lambda x: {"finish": lambda o: o},
    words.ratio: lambda x: {"finish": over_count},
    words.damped: lambda x: {"finish": lambda o: over_count(o, 1e-5)},
    words.bonus: lambda x: {"finish": lambda o: o, "u": x["u"]},
}


def has_normal(row: Row) -> bool:
    """Whether all three words of the row unroll; the others have a chunk form of their own."""
    return row.decay in FORGOTTEN and row.update in WRITTEN and row.read in ASKED


PLAIN = (words.keep, words.fixed, words.scalar, words.channel, printed.timed)  # decays of heads or of key channels
PASSED_ON = (words.inclusive, words.bonus)  # reads that hand on what a memory gives, as it is


def is_plain(row: Row) -> bool:
    """Whether the normal form of the row is one that kernels compute."""
    return has_normal(row) and not row.features and row.decay in PLAIN


def passes_on(row: Row) -> bool:
    """Whether kernels find spans of the row, and what memories receive, without its outputs."""
    return is_plain(row) and row.read in PASSED_ON


def normal(row: Row, x: Inputs) -> Normal:
    """The row's tokens (and constants, all in x) in normal form."""
    x = featured(row, x)
    return Normal(x["q"], **WRITTEN[row.update](x), **FORGOTTEN[row.decay](x), **ASKED[row.read](x))
