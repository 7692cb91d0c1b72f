"""Our chunk form beside the recurrences of flash-linear-attention in plain PyTorch, on a CPU: the same inputs, float32.

    python bench/peers.py --out FILE        needs flash-linear-attention (fla-core), which nothing else here does

One JSON line a row: the largest difference of the outputs and of the last memory, each over the largest number. Not
compared: Comba's and Titans' loops there, which decay or differentiate otherwise than their kernels; TTT-linear, which
is another function there; and rows that it does not have.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, where it is not installed

import torch
from torch import Tensor

from bench import commit, reason
from reference import chunked, example
from reference.lsm import LSM
from reference.recurrence import empty

SIZES = {"b": 2, "t": 131, "h": 3, "k": 8, "v": 8, "m": 5, "l": 9}
Found = tuple[Tensor, Tensor | None]  # outputs, the last memory (None: not returned)


def heads_first(x: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [x[n].transpose(1, 2) for n in names]


def gla(x, M) -> Found:
    from fla.ops.gla.naive import naive_recurrent_gla

    k = x["k"] if "k" in x else -torch.expm1(x["g"])
    return naive_recurrent_gla(x["q"] * SIZES["k"] ** 0.5, k, x["v"], x["g"], M, True)


def simple_gla(x, M) -> Found:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    g = x["g"].expand(x["v"].shape[:3]) if "g" in x else torch.zeros(x["v"].shape[:3])
    return naive_recurrent_simple_gla(x["q"], x["k"], x["v"], g, 1.0, M, True)


def rwkv6(x, M) -> Found:
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    o, last = naive_recurrent_rwkv6(*heads_first(x, "q", "k", "v", "g"), x["u"], 1.0, M, True)
    return o.transpose(1, 2), last


def rwkv7(x, M) -> Found:
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    q, k, v, a, b, g = heads_first(x, "q", "k", "v", "a", "b", "g")
    o, last = dplr_recurrence(q * SIZES["k"] ** 0.5, k, v, a, b, g, M, True)
    return o.transpose(1, 2), last


def delta_net(x, M) -> Found:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k, v, beta = heads_first(x, "q", "k", "v", "beta")
    o, last = delta_rule_recurrence(q * SIZES["k"] ** 0.5, k, v, beta, M)
    return o.transpose(1, 2), last


def gated_delta_net(x, M) -> Found:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    return naive_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], x["beta"], x["g"], 1.0, M, True)


def kda(x, M) -> Found:
    from fla.ops.kda.naive import naive_recurrent_kda

    return naive_recurrent_kda(x["q"], x["k"], x["v"], x["g"], x["beta"], 1.0, M, True)


def gsa(x, M) -> Found:
    from fla.ops.gsa.naive import naive_recurrent_gsa

    keys, values = M.split([SIZES["k"], SIZES["v"]], -1)
    s = -torch.expm1(x["g"])
    o, (keys, values) = naive_recurrent_gsa(x["q"], x["k"], x["v"], s, x["g"], 1.0, (keys.mT, values), True)
    return o, torch.cat([keys.mT, values], -1)


def mesa(x, M) -> Found:
    from fla.ops.mesa_net.naive import naive_mesa_net_exact

    G, values = M.split([SIZES["k"], SIZES["v"]], -1)
    G = G @ G.mT  # of keys among themselves: symmetric
    M[..., : SIZES["k"]] = G
    o, G, values = naive_mesa_net_exact(x["q"], x["k"], x["v"], x["g"], x["ridge"], x["beta"], G, values)
    return o, torch.cat([G, values], -1)


def log_linear(x, M) -> Found:
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

    M.zero_()  # it starts from nothing, at position 0
    return naive_log_linear_attn(x["q"], x["k"], x["v"], x["g"], x["weight"]), None


PEER: dict[str, Callable[[dict, Tensor], Found]] = {
    "linear_attention": simple_gla,
    "lightning": simple_gla,
    "retention": simple_gla,
    "mamba2": simple_gla,
    "gla": gla,
    "hgrn2": gla,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "kda": kda,
    "gsa": gsa,
    "mesa": mesa,
    "log_linear_mamba2": log_linear,
}


def compared(name: str) -> dict[str, float]:
    """The largest differences, over the largest numbers."""
    row = LSM[name]
    tokens, constants = example.inputs(row, SIZES, dtype=torch.float32)
    if "place" in tokens:
        tokens["place"] = torch.arange(SIZES["t"]).expand(SIZES["b"], -1)
    M = torch.randn(empty(row, tokens, constants).shape, generator=torch.Generator().manual_seed(1))
    theirs = PEER[name](tokens | constants, M)
    ours = chunked.recurrence(row, tokens, constants, M)
    pairs = {what: pair for what, *pair in zip(("output", "memory"), ours, theirs, strict=True) if pair[1] is not None}
    return {what: ((a - b).abs().max() / b.abs().max()).item() for what, (a, b) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=commit(), help="of the code compared")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, appended to")
    args = parser.parse_args()
    versions = {"torch": torch.__version__}
    try:
        versions["fla"] = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        sys.exit("bench/peers.py: flash-linear-attention is not installed: pip install fla-core==0.6.0")
    head = {"date": datetime.date.today().isoformat(), **versions, "commit": args.commit}
    with args.out.open("a") as file:
        for name in PEER:
            try:
                line = {"row": name, "peer": PEER[name].__name__, **compared(name)}
            except Exception as error:
                line = {"row": name, "peer": PEER[name].__name__, "reason": reason(error)}
            print(json.dumps({**head, **line}), file=file)
            print(line)


if __name__ == "__main__":
    main()
