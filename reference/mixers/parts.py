"""What several mixers share: parameters that know how they start, gates, and one step of a row."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.lsm import row
from reference.recurrence import Memory

Start = Callable[[tuple[int, ...], torch.Generator], Tensor]


def parameter(*shape: int, start: Start) -> nn.Parameter:
    """A parameter that is no matrix of a projection: it starts as `start(shape, generator)` and never decays."""
    weight = nn.Parameter(torch.empty(shape))
    weight.start = start
    return weight


def constant(value: float) -> Start:
    return lambda shape, rng: torch.full(shape, value)


def identity(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.eye(*shape)


def normal(std: float) -> Start:
    return lambda shape, rng: torch.randn(shape, generator=rng) * std


def uniform(low: float, high: float) -> Start:
    return lambda shape, rng: low + (high - low) * torch.rand(shape, generator=rng)


def orthogonal(gain: float) -> Start:
    return lambda shape, rng: nn.init.orthogonal_(torch.empty(shape), gain, rng)


def log_uniform(low: float, high: float) -> Start:
    """log of a number drawn evenly from (low, high): Mamba's A_log."""
    return lambda shape, rng: uniform(low, high)(shape, rng).clamp(min=1e-4).log()


def time_step(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """dt_bias whose softplus is log-uniform in [1e-3, 0.1] (Mamba 2312.00752, section 3.6)."""
    dt = uniform(math.log(1e-3), math.log(0.1))(shape, rng).exp().clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def even_gates(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Biases whose sigmoid is even in (1/n, 1 - 1/n): a gate for every length of memory (1910.09890)."""
    return uniform(1 / shape[0], 1 - 1 / shape[0])(shape, rng).logit()


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def convolution(channels: int, width: int) -> nn.Parameter:
    return parameter(channels, width, start=uniform(-(width**-0.5), width**-0.5))


def wide(x: Tensor) -> Tensor:
    """Float32 at least: gates, memories and norms are never computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def dt_gate(u: Tensor, A_log: Tensor, dt_bias: Tensor, floor: float | None = None) -> Tensor:
    """g = -exp(A_log) softplus(u + dt_bias), float32: the log decay of Mamba2 and of the gated delta rules.

    With a floor below 0 it stays above it: g = floor sigmoid(exp(A_log) (u + dt_bias)).
    """
    rate, u = wide(A_log).exp(), wide(u) + wide(dt_bias)
    return -rate * F.softplus(u) if floor is None else floor * torch.sigmoid(rate * u)


def alone(x: Tensor) -> Tensor:
    """The sum over ranks of a layer that one rank has whole."""
    return x


class Taps(NamedTuple):
    """The state of a row behind short convolutions."""

    memory: Memory
    taps: Float[Tensor, "b w1 c"]


class Only(NamedTuple):
    """The state of a row alone."""

    memory: Memory


# Fields of the configuration, None unless wanted, that few layers have.
OPTIONAL = ("value_heads", "gate_floor", "projection_experts")


class Mixer(nn.Module):
    """A layer around the row `config.lsm`. `key_size` and `value_size` of the configuration go before the defaults.

    A layer has a `forward` of its own, or is three steps: `inputs(x, side, state) -> (tokens, constants, carried)`, the
    row, and `output(o, x) -> y`; `carried` is what its `state` has besides the memory.
    Some have more heads of values than of keys; value head j then has key head j // (value_heads / heads).
    Raises ValueError, in one line, for a field of the configuration that this layer does not have, and for a width that
    leaves a head no channels.
    """

    state = Only
    own: tuple[str, ...] = ()  # the submodules that each memory of a mixture of this layer has for itself
    takes: tuple[str, ...] = ()  # those of OPTIONAL that the layer has
    gives_values = False  # whether it hands its values on to later layers, as `side.values`
    needs_values = False  # whether it needs those that an earlier layer handed on
    narrow = True  # whether what it sees meets products alone, and so may come in their dtype
    scattered = False  # whether a parameter meets what comes of the tokens, and again what comes of that

    def __init__(self, config, ops, key_size: int, value_size: int):
        super().__init__()
        for name in OPTIONAL:
            if getattr(config, name) is not None and name not in self.takes:
                title = row(config.lsm).title
                raise ValueError(f"{title} has no {name}: it is {getattr(config, name)}, expected None")
        self.ops, self.row, self.heads, self.eps = ops, row(config.lsm), config.heads, config.eps
        self.key_size = config.key_size or key_size
        self.value_size = config.value_size or value_size
        if not self.key_size or not self.value_size:
            raise ValueError(
                f"width {config.width} is too small for {config.heads} heads of {self.row.title}: a key would have "
                f"{self.key_size} channels and a value {self.value_size}; use fewer heads, or give both sizes"
            )
        self.value_heads = config.value_heads or self.heads
        self.first, self.all_heads = 0, self.heads  # this layer's place among heads that several ranks share
        self.summed = alone  # what is a sum over channels -> that over the channels of all these ranks
        self.keys, self.values = self.heads * self.key_size, self.value_heads * self.value_size

    @classmethod
    def common(cls, config, layers: int) -> dict[str, nn.Parameter]:
        """Parameters that all layers of this kind share; they come back in `side.common`."""
        return {}

    def forward(self, x: Float[Tensor, "b t d"], side, state=None):
        tokens, constants, carried = self.inputs(x, side, state)
        o, memory = self.advance(tokens, constants, state and state.memory, side)
        return self.output(o, x), self.state(memory, *carried)

    def split(self, x: Float[Tensor, "b t hd"]) -> Float[Tensor, "b t h d"]:
        return x.unflatten(-1, (self.heads, -1))

    def split_values(self, x: Float[Tensor, "b t hd"]) -> Float[Tensor, "b t h d"]:
        return x.unflatten(-1, (self.value_heads, -1))

    def advance(self, tokens: dict, constants: dict, memory: Memory | None, side, steps=1) -> tuple[Tensor, Memory]:
        """The row over these tokens, each of which takes `steps` steps, with an output after every step.

        Step by step if a running sequence gets one token, else the whole recurrence.
        """
        running = memory is not None and side.cu_seqlens is None and not torch.is_grad_enabled()
        if not running or tokens["v"].shape[1] != steps:
            return self.ops.recurrence(self.row, tokens, constants, memory, side.cu_seqlens)
        outputs = []
        for i in range(steps):
            now = {name: x[:, i : i + 1] for name, x in tokens.items()}
            o, memory = self.ops.step(self.row, now, constants, memory)
            outputs.append(o)
        return torch.cat(outputs, 1), memory


def head_norm(size: int) -> nn.Parameter:
    """The weight of a norm, over one head or over all."""
    return parameter(size, start=constant(1.0))
