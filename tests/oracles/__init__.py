"""Independent implementations of the layers around the rows, as functions of our layers' weights.

They are the classes of transformers, where it has the layer, and otherwise the published formula, written out token by
token and head by head. A family a file, each with its ORACLES.
"""

from oracles import (
    attention,
    delta,
    gated,
    linear_attention,
    log_linear,
    memories,
    polynomial,
    printed,
    regression,
    rwkv,
    slots,
    ssm,
)

FAMILIES = (
    attention,
    linear_attention,
    polynomial,
    gated,
    rwkv,
    delta,
    ssm,
    slots,
    regression,
    log_linear,
    memories,
    printed,
)
ORACLES = {name: oracle for family in FAMILIES for name, oracle in family.ORACLES.items()}
