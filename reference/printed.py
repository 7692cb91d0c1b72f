"""Rules as Table 1 of Linear-MoE (2503.05447) prints them, where that differs from the models they stand for.

The table of `reference.lsm` has each model as its own paper and released code define it. The survey table is looser:
it drops signs, ties or factors. What it prints is kept here, by the same names with `_printed` behind, as a row each;
all have the layer of `reference.mixers.printed`. Use them to see what a detail is worth, not to train: a rule whose
sign is that of the gradient climbs it.

    printed                                 the model's own rule
    retention         a M + kᵀv             a head has its own a (and Lightning's layer, too)
    delta_net         (I - a kᵀk) M + b kᵀv      a = b
    gated_delta_net   a (I - kᵀk) M + b kᵀv      b in both places
    rebased           M + φ(k)ᵀv            LayerNorm before φ, divided by the count
    fast weights      A ⊙ M + kᵀv           A of rank one (GFW), or complex and diagonal (GateLoop)
    ttt, titans       M + b ∇l, a M + b ∇l       minus, and momentum or mini-batches
    s4, mamba         e^{-(a1ᵀ)A} ⊙ M + (a1ᵀ) ⊙ kᵀv    the time step belongs to the value channel
    mamba2            e^{-ab} M + b kᵀv     and D x beside it
    hgrn2             diag(a) M + (1-a)ᵀv   a is bounded below
    rwkv6             diag(a) M + kᵀv, o = q M        reads before it writes, with a bonus
    rwkv7             diag(a) M + b ∇l      minus, keys of their own to erase
"""

from reference.recurrence import (
    Row,
    channel,
    inclusive,
    keep,
    look,
    outer,
    scalar,
    squares,
    tied,
    write,
)

# ------------------------------------------------------------------------------------------------------ the words


# decay
def timed(M, x):  # a rate a head, times what the token writes with
    return (x["A"] * x["beta"]).exp()[..., None, None] * M


def stepped(M, x):  # a rate an element, times a time step for the key channel
    return (x["A"] * x["dt"][..., None]).exp() * M


def full(M, x):  # a number an element and token
    return x["G"].exp() * M


# update
def weighed(M, before, x):
    return write(M, x["beta"][..., None] * x["k"], x["v"])


def paced(M, before, x):
    return write(M, x["dt"] * x["k"], x["v"])


def independent(M, before, x):  # erase with alpha (1 if there is none), write with beta
    found = look(M, x["k"]) * (x["alpha"][..., None] if "alpha" in x else 1.0)
    return write(M, x["k"], x["beta"][..., None] * x["v"] - found)


def ascent(M, before, x):  # up the gradient of |kM - v|^2 / 2
    return write(M, x["k"], x["beta"][..., None] * (look(before, x["k"]) - x["v"]))


# ------------------------------------------------------------------------------------------------------ the table

QKV = {"q": "b t h k", "k": "b t h k", "v": "b t h v"}
ONE, EACH, BETA = {"g": "b t h"}, {"g": "b t h k"}, {"beta": "b t h"}
STEPS = QKV | {"dt": "b t h k"}
RATES = {"A": "h k v"}


def row(decay, update, title: str, tokens, constants=None, layer: str = "Printed", features=None) -> Row:
    mixer = f"printed:{layer}"
    return Row(
        decay, update, inclusive, tokens, constants or {}, mixer, f"{title} as printed", "2503.05447", "k v", features
    )


PRINTED: dict[str, Row] = {
    "retention_printed": row(scalar, outer, "Lightning and Retention", QKV | ONE, layer="OneDecay"),
    "delta_net_printed": row(keep, independent, "DeltaNet", QKV | BETA | {"alpha": "b t h"}),
    "rebased_printed": row(keep, outer, "ReBased", QKV, features=squares),
    "fast_weights_printed": row(full, outer, "Gated fast weights and GateLoop", QKV | {"G": "b t h k v"}),
    "gated_delta_net_printed": row(scalar, independent, "Gated DeltaNet", QKV | ONE | BETA),
    "ttt_printed": row(keep, ascent, "TTT", QKV | BETA),
    "titans_printed": row(scalar, ascent, "Titans", QKV | ONE | BETA),
    "s4_printed": row(stepped, paced, "S4", STEPS, RATES, "Stationary"),
    "mamba_printed": row(stepped, paced, "Mamba", STEPS, RATES),
    "mamba2_printed": row(timed, weighed, "Mamba2", QKV | BETA, {"A": "h"}),
    "hgrn2_printed": row(channel, tied, "HGRN2", {"q": "b t h k", "v": "b t h v"} | EACH),
    "rwkv6_printed": row(channel, outer, "RWKV6", QKV | EACH),
    "rwkv7_printed": row(channel, ascent, "RWKV7", QKV | EACH | BETA),
}
