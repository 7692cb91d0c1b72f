"""The typed configuration of a model, and the published shapes."""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from reference.lsm import LSM
from reference.mixers.linear_attention import FEATURE_MAP
from reference.mixers.softmax import ATTENTION
from reference.moe import EXPERT
from reference.released import RELEASED
from reference.routers import QUEUE, ROUTER

LATENT_SIZES = ("latent_rank", "query_rank", "nope_size", "latent_value_size")
LETTERS = {"L": "linear", "N": "softmax attention", "E": "experts", "D": "dense", "+": "side by side"}
PROJECTIONS = ("input", "gate", "output")


@dataclass(frozen=True)
class Model:
    """What a model is made of. Sizes are channels unless said."""

    pattern: str = "LLLN"
    """One letter a sublayer: L linear, N softmax attention, E experts, D dense. Only L and N: each is followed by E.
    L+E: side by side in one sublayer, x + L(norm(x)) + E(norm(x))."""
    repeat: int = 1
    """How many times the pattern stands in the stack."""
    first: str = ""
    """Letters that stand once, before all patterns: say, a dense first layer."""
    last: str = ""
    """Letters that stand once, behind all patterns."""
    bare: bool = False
    """Whether a pattern (or first, or last) of only L and N stays as it is: no E is put behind its letters."""
    lsm: Literal[tuple(LSM)] = "gated_delta_net"
    """The linear sequence model of every L."""
    vocabulary: int = 257
    """Number of tokens: 256 bytes and the start of a document."""
    width: int = 128
    """Of the residual stream."""
    heads: int = 4
    """Of L, and of N unless it has its own."""
    attention_heads: int | None = None
    """Of N (None: heads)."""
    attention: Literal[tuple(ATTENTION)] = "grouped"
    """The softmax attention of every N: heads of keys and values, a latent from which all heads read theirs, or a
    mixture of heads (JetMoE), whose queries and outputs are experts."""
    window: int | None = None
    """Tokens that a token of N sees, itself included (None: all before it)."""
    head_size: int | None = None
    """Of one head of N (None: width / its heads)."""
    key_heads: int | None = None
    """Key and value heads of grouped attention that the query heads share (None: one each)."""
    qk_norm: bool = False
    """Whether grouped attention has an RMS norm on each head's query and key."""
    qkv_bias: bool = False
    """Whether the queries, keys and values of grouped attention have a bias (Qwen2)."""
    attention_gate: bool = False
    """Whether a sigmoid gates the output of N, channel by channel."""
    latent_rank: int | None = None
    """Of latent attention's keys and values: what is kept of a token (None: four heads, as published)."""
    query_rank: int | None = None
    """Of latent attention's queries (None: full)."""
    nope_size: int | None = None
    """Of one head's key in latent attention that has no position (None: a head)."""
    rope_size: int | None = None
    """Of the key that latent attention's heads share and that turns with the position (None: half a head)."""
    latent_value_size: int | None = None
    """Of one head's value in latent attention (None: a head)."""
    key_size: int | None = None
    """Of one head of L (None: as published for the model)."""
    value_size: int | None = None
    """Of one head of L (None: as published for the model)."""
    value_heads: int | None = None
    """Heads of values in L that share heads of keys, in the models that have them (None: as many as heads)."""
    feature_map: Literal[tuple(FEATURE_MAP)] = "elu"
    """Of linear attention's queries and keys."""
    gate: bool = True
    """Whether linear attention has an output gate (as in Linear-MoE); other models have theirs as published."""
    negative_eigenvalues: bool | None = None
    """Whether the write strength of delta rules reaches 2 instead of 1: a memory may then flip signs (2411.12537).
    None: as published for the model."""
    delta_steps: int = 2
    """Steps that Gated DeltaProduct takes for one token."""
    gate_floor: float | None = None
    """A number below 0 that the log decay of Kimi Delta Attention stays above (None: no floor)."""
    convolution: int = 4
    """Taps of the short convolutions, in the models that have them."""
    levels: int = 15
    """Memories of log-linear attention, of 1, 2, 4, ... tokens."""
    memories: int = 4
    """Of a mixture of memories, besides the one that all tokens share."""
    memories_kept: int = 2
    """Memories of a mixture that a token writes to."""
    state_groups: int = 1
    """Of Mamba2's heads: each group shares its B and C, and is normed by itself."""
    step_limits: tuple[float, float] = (0.0, math.inf)
    """Least and largest time step of Mamba2."""
    state_norm: Literal["none", "learned", "weightless"] = "none"
    """RMS norm of Mamba's dt, B and C: with weights as in Jamba, without as in Falcon Mamba."""
    projection_experts: tuple[Literal[PROJECTIONS], ...] | None = None
    """Projections of Mamba, each of which becomes several, one for each token to choose (None: none)."""
    mixer_experts: int = 8
    """Inside a mixer: of a mixture of heads, or of each projection that is several."""
    mixer_top_k: int = 2
    """Experts of a mixture of heads that a token uses."""
    slots: int = 64
    """Of one head of gated slot attention."""
    mini_batch: int = 16
    """Tokens whose gradients TTT takes from one memory."""
    router: Literal[tuple(ROUTER)] = "linear_moe"
    """Which experts a token visits."""
    experts: int = 8
    """In every E."""
    top_k: int = 2
    """Experts a token visits."""
    expert_width: int = 256
    """Hidden channels of one expert."""
    expert_kind: Literal[tuple(EXPERT)] = "swiglu"
    """What stands between the two matrices of an expert, and of a D."""
    expert_biases: bool = False
    """Whether router and experts add biases (GPT-OSS)."""
    shared_width: int = 0
    """Hidden channels of the expert that every token visits (0: none)."""
    shared_gate: bool = False
    """Whether a sigmoid gates the shared expert (Qwen2-MoE)."""
    groups: int = 1
    """Of experts, for routers that choose groups first."""
    groups_kept: int = 1
    """Groups that a token may visit."""
    capacity_factor: float | None = None
    """An expert's room over its share of the tokens (None: as published; inf: never full)."""
    drop: Literal[tuple(QUEUE)] | None = None
    """Whom a full expert turns away first: the latest position, the second slots, the least probability, the second
    slots of the least probable tokens (None: as published)."""
    pad: bool = False
    """Whether every expert computes as many rows as it has room for."""
    identity: int = 0
    """Experts besides, that return the token as it is."""
    latent: int = 0
    """Channels that the experts see of a token (0: the token itself)."""
    expert_slots: int = 1
    """Of one expert, for Soft MoE."""
    jitter: float | None = None
    """In training the router sees the token times 1 - jitter to 1 + jitter (None: as published)."""
    expert_dropout: float = 0.0
    """Share of the experts' hidden channels set to zero in training."""
    dense_width: int = 512
    """Hidden channels of a D."""
    rope_base: float = 10000.0
    """Longest wavelength of the rotary positions, over 2 pi."""
    rope_share: float = 1.0
    """Part of a head of N (in latent attention: of its shared key) that turns with the position (0: none, NoPE)."""
    tied: bool = False
    """Whether the output head is the embedding."""
    dropout: float = 0.0
    """Share of each sublayer's output set to zero in training."""
    eps: float = 1e-5
    """Of every RMS norm."""

    def __post_init__(self):
        for name in ("pattern", "first", "last"):
            self.check_letters(name, getattr(self, name))
        if self.lsm not in LSM:
            raise ValueError(f"unknown linear sequence model {self.lsm!r}; expected one of {', '.join(LSM)}")
        if self.feature_map not in FEATURE_MAP:
            raise ValueError(f"unknown feature map {self.feature_map!r}; expected one of {', '.join(FEATURE_MAP)}")
        if self.router not in ROUTER:
            raise ValueError(f"unknown router {self.router!r}; expected one of {', '.join(ROUTER)}")
        if self.attention not in ATTENTION:
            raise ValueError(f"unknown attention {self.attention!r}; expected one of {', '.join(ATTENTION)}")
        for name in ("repeat", "vocabulary", "width", "heads", "experts", "top_k", "expert_width", "dense_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        optional = ("convolution", "key_heads", "key_size", "value_size", "value_heads", "state_groups", "slots")
        optional += ("mini_batch", "delta_steps", "levels", "memories", "window", "attention_heads", "head_size")
        optional += ("mixer_experts", *LATENT_SIZES)
        for name in optional:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rope_base", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.rope_size is not None and self.rope_size < 0:
            raise ValueError(f"rope_size is {self.rope_size}; it must be at least 0")
        queries = self.attention_heads or self.heads
        if self.width % self.heads and "L" in self.letters:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.width % queries and "N" in self.letters and self.head_size is None:
            raise ValueError(f"width {self.width} does not divide into {queries} heads of attention")
        if queries % (self.key_heads or queries):
            raise ValueError(f"{queries} heads cannot share {self.key_heads} key_heads: heads must be a multiple")
        if (self.value_heads or self.heads) % self.heads:
            raise ValueError(f"{self.value_heads} value_heads cannot share {self.heads} heads: they must be a multiple")
        if self.gate_floor is not None and not -math.inf < self.gate_floor < 0:
            raise ValueError(f"gate_floor is {self.gate_floor}; it must be below 0 and finite")
        if not 0 <= self.rope_share <= 1:
            raise ValueError(f"rope_share is {self.rope_share}; it must be at least 0 and at most 1")
        if "N" in self.letters:
            self.check_turning()
        if self.top_k > self.experts and "E" in self.letters:
            raise ValueError(f"top_k {self.top_k} needs at least as many experts, got {self.experts}")
        if not 0 <= self.step_limits[0] < self.step_limits[1]:
            raise ValueError(f"step_limits are {self.step_limits}; the least must be at least 0 and below the largest")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in self.projection_experts or ():
            if name not in PROJECTIONS:
                raise ValueError(
                    f"unknown projection {name!r}; projection_experts are some of {', '.join(PROJECTIONS)}"
                )

    def check_letters(self, name: str, text: str) -> None:
        if set(text) - set(LETTERS) or (name == "pattern" and not text):
            wrong = "".join(sorted(set(text) - set(LETTERS)))
            known = ", ".join(f"{letter} ({what})" for letter, what in LETTERS.items())
            raise ValueError(f"{name} {text!r} has letters {wrong!r}; allowed are {known}")
        if "+" in text and "" in text.split("+"):
            raise ValueError(f"{name} {text!r} has a + that is not between two letters, as in L+E")
        for group in side_by_side(text):
            if sum(letter in "LN" for letter in group) > 1:
                raise ValueError(f"{name} {text!r} has two mixers side by side in {group}; allowed is one, as in L+E+D")

    def check_turning(self) -> None:
        """Channels turn in pairs; a share above 0 must turn one at least, if there is anything to turn."""
        kind = ATTENTION[self.attention]
        size, turning = kind.may_turn(self), kind.turning(self)
        if turning % 2 or (size and self.rope_share and not turning):
            asked = f"rope_share {self.rope_share} of a head of {size}"
            raise ValueError(f"{asked}: {turning} channels cannot rotate, they turn in pairs, use an even number")

    @property
    def letters(self) -> str:
        """The whole stack, one letter a sublayer: LLLN stands for LELELENE."""
        return self.spelled(self.first) + self.spelled(self.pattern) * self.repeat + self.spelled(self.last)

    def spelled(self, part: str) -> str:
        short = not self.bare and not set(part) & set("ED")
        return "".join(letter + "E" if short else letter for letter in part)


def side_by_side(letters: str) -> list[str]:
    """The letters of each sublayer: LE+DN is L, E+D, N."""
    return re.findall(r"\w(?:\+\w)*", letters)


TINY = Model(pattern="LLLN", lsm="mamba2", key_size=32, value_size=64, experts=8, top_k=2, expert_width=128)
LINEAR = Model(
    pattern="L",
    lsm="linear_attention",
    vocabulary=151936,
    router="linear_moe",
    experts=64,
    top_k=8,
    key_size=128,
    value_size=128,
)
A03B = replace(LINEAR, repeat=12, width=1024, heads=8, expert_width=896)
A1B = replace(LINEAR, repeat=16, width=2048, heads=16, expert_width=1024)

PRESETS: dict[str, tuple[str, Model]] = {
    "tiny": ("two CPU cores, three minutes", TINY),
    "a0.3b-2b": ("Linear-MoE A0.3B-2B, pure linear (2503.05447)", A03B),
    "a0.3b-2b-hybrid": ("Linear-MoE A0.3B-2B, one layer in four softmax", replace(A03B, pattern="LLLN", repeat=3)),
    "a1b-7b": ("Linear-MoE A1B-7B, pure linear (2503.05447)", A1B),
    "a1b-7b-hybrid": ("Linear-MoE A1B-7B, one layer in four softmax", replace(A1B, pattern="LLLN", repeat=4)),
    **{name: (what, Model(**fields)) for name, (what, fields) in RELEASED.items()},
}
