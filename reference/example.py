"""Random inputs for any row of the table, from the shapes that it declares, and the error budget of any other path.

`DRAWN` is the one list of ranges: a new row whose inputs have names of their own adds a line there, if plain normal
numbers do not do. Everything is drawn in float64 and then rounded, so that all dtypes get the same numbers.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.printed import ascent
from reference.recurrence import Row, counted, foresight, momentum, replace

Drawn = Mapping[str, Callable[[Tensor], Tensor]]

# How an input is made of normal numbers. Names that are not here stay normal numbers.
DRAWN: Drawn = {
    "k": lambda x: F.normalize(x, dim=-1),  # what a delta rule needs to be stable
    "g": F.logsigmoid,
    "f": F.logsigmoid,
    "beta": lambda x: 2 * x.sigmoid(),
    "dt": F.softplus,
    "A": lambda x: -x.exp(),
    "a": lambda x: -0.7 * F.normalize(x, dim=-1),
    "b": lambda x: 0.7 * F.normalize(x, dim=-1),
    "ridge": torch.exp,
    "alpha": torch.sigmoid,
    "G": F.logsigmoid,
    "place": lambda x: (torch.arange(x.shape[1]) + 3 * torch.arange(1, 1 + len(x))[:, None]) % 7,
}
GATES = ("g", "f", "G")  # the inputs that are log decays: `extreme` spoils these
# As trained models have them: gates near 1, write strengths below 1.
TRAINED: Drawn = {
    **DRAWN,
    **dict.fromkeys(GATES, lambda x: F.logsigmoid(x + 3)),
    "beta": torch.sigmoid,
    "place": lambda x: (torch.arange(x.shape[1]) % 16).expand(x.shape),
}
# What a word asks beyond that: a normaliser divides by the sum of the weights, which must be positive; momentum takes
# every step of beta again and again.
ASKED: Mapping[Callable, Drawn] = {
    counted: dict.fromkeys("qk", lambda x: x.abs() + 0.1),
    momentum: {"beta": lambda x: x / 8},
    ascent: {"beta": lambda x: x / 8},  # which grows what it should undo
}
# Keys that erase, along what they erase, as the layers have them: with unrelated ones, as the tests draw them, a memory
# that hardly decays has no bound.
ALIGNED: Mapping[Callable, Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]] = {
    foresight: {"a": lambda x: 0.7 * x["k"]},
    replace: {"b": lambda x: -x["a"]},
}
OTHER = 4  # the size of a letter that the caller does not know, such as a row's number of slots

EXTREME = (0.0, -1e4, -torch.inf, -1e-7, -60.0)


def inputs(
    row: Row, sizes: Mapping[str, int], seed: int = 0, dtype=torch.float64, drawn: Drawn = DRAWN
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tokens, constants) of the row's shapes, `sizes` by letter (b t h k v, and what the row has of its own)."""
    rng = torch.Generator().manual_seed(seed)
    asked = ASKED.get(row.update, {})
    sizes = {"r": sizes["k"] + 1, **sizes}  # a bias goes with the keys

    def draw(name: str, shape: str) -> Tensor:
        x = torch.randn([sizes.get(n, OTHER) for n in shape.split()], generator=rng, dtype=torch.float64)
        x = asked.get(name, same)(drawn.get(name, same)(x))
        return x.to(dtype) if x.is_floating_point() else x

    tokens, constants = ({n: draw(n, shape) for n, shape in kind.items()} for kind in (row.tokens, row.constants))
    return tokens, constants


def same(x: Tensor) -> Tensor:
    return x


def extreme(g: Tensor, seed: int = 0, share: float = 0.5) -> Tensor:
    """The gates with a share of them replaced by `EXTREME`, each as often as the others."""
    rng = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, round(len(EXTREME) / share), g.shape, generator=rng)
    for i, gate in enumerate(EXTREME):
        g = torch.where(pick == i, torch.tensor(gate, dtype=g.dtype), g)
    return g


def error(x: Tensor, exact: Tensor) -> float:
    """max |x - exact|, NaN if x holds one; 0 of nothing."""
    return (x.double() - exact).abs().max().item() if exact.numel() else 0.0


def allowed(plain: Tensor, exact: Float[Tensor, "..."], eps: float) -> float:
    """The error budget: 2 max |plain - exact| + eps max |exact|.

    `exact` is the token loop in float64, `plain` the token loop in the dtype that is judged, `eps` its rounding.
    """
    return 2 * error(plain, exact) + eps * error(torch.zeros_like(exact), exact)
