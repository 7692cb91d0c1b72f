"""The table of linear sequence models: each is three words of `reference.recurrence`.

To add one, add a row here and its layer in `reference/mixers/`; the command line, the tests, the benchmark and the
README's table read this file.
"""

from reference.recurrence import (
    Row,
    bonus,
    channel,
    counted,
    delta,
    fixed,
    foresight,
    inclusive,
    keep,
    outer,
    ratio,
    replace,
    scalar,
    tied,
)

QKV = {"q": "b t h k", "k": "b t h k", "v": "b t h v"}
ONE = {"g": "b t h"}  # log decay, a number a head
EACH = {"g": "b t h k"}  # log decay, a number a key channel
BETA = {"beta": "b t h"}
SLOPES = {"g": "h"}
STACKED = "2*k v"  # two memories above each other, or a complex one

LSM: dict[str, Row] = {
    "linear_attention": Row(
        keep,
        outer,
        inclusive,
        QKV,
        {},
        "linear_attention:LinearAttention",
        "Linear attention",
        "2006.16236",
    ),
    "linear_attention_normalized": Row(
        keep,
        counted,
        ratio,
        QKV,
        {},
        "linear_attention:NormalizedLinearAttention",
        "Linear attention with normaliser",
        "2006.16236",
        "k v+1",
    ),
    "lightning": Row(
        fixed,
        outer,
        inclusive,
        QKV,
        SLOPES,
        "linear_attention:Lightning",
        "Lightning Attention",
        "2501.08313",
    ),
    "retention": Row(fixed, outer, inclusive, QKV, SLOPES, "linear_attention:Retention", "Retention", "2307.08621"),
    "mamba2": Row(scalar, outer, inclusive, QKV | ONE, {}, "mamba2:Mamba2", "Mamba2", "2405.21060"),
    "gla": Row(channel, outer, inclusive, QKV | EACH, {}, "gated:GLA", "GLA", "2312.06635"),
    "hgrn2": Row(
        channel,
        tied,
        inclusive,
        {"q": "b t h k", "v": "b t h v"} | EACH,
        {},
        "gated:HGRN2",
        "HGRN2",
        "2404.07904",
    ),
    "rwkv6": Row(channel, outer, bonus, QKV | EACH, {"u": "h k"}, "rwkv:RWKV6", "RWKV6", "2404.05892"),
    "delta_net": Row(keep, delta, inclusive, QKV | BETA, {}, "delta:DeltaNet", "DeltaNet", "2406.06484"),
    "gated_delta_net": Row(
        scalar,
        delta,
        inclusive,
        QKV | ONE | BETA,
        {},
        "delta:GatedDeltaNet",
        "Gated DeltaNet",
        "2412.06464",
    ),
    "kda": Row(
        channel,
        delta,
        inclusive,
        QKV | EACH | BETA,
        {},
        "delta:KDA",
        "Kimi Delta Attention",
        "2510.26692",
    ),
    "comba": Row(
        scalar,
        foresight,
        inclusive,
        QKV | ONE | BETA | {"a": "b t h k"},
        {},
        "delta:Comba",
        "Comba",
        "2506.02475",
    ),
    "gated_delta_product": Row(
        scalar,
        delta,
        inclusive,
        QKV | ONE | BETA,
        {},
        "delta:GatedDeltaProduct",
        "Gated DeltaProduct",
        "2502.10297",
    ),
    "rwkv7": Row(
        channel,
        replace,
        inclusive,
        QKV | EACH | {"a": "b t h k", "b": "b t h k"},
        {},
        "rwkv:RWKV7",
        "RWKV7",
        "2503.14456",
    ),
}


def row(name: str) -> Row:
    """The row of that name; ValueError lists the names there are."""
    if name not in LSM:
        raise ValueError(f"unknown linear sequence model {name!r}; expected one of {', '.join(LSM)}")
    return LSM[name]
