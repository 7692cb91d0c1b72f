"""The second backend: what flash-linear-attention's operators are handed, by operators that only write it down.

On a GPU, where the package is installed, its operators themselves are held to the token loop.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import reference
from fast import fla
from inputs import assert_within_budget, make, start
from reference import chunked
from reference import recurrence as exact
from reference.lsm import LSM

# the parameters that an operator of 0.6.0 has, as published, of those that matter here
COMMON = {"scale", "initial_state", "output_final_state", "cu_seqlens"}
NAMES = {
    "chunk_linear_attn": {"q", "k", "v", "normalize"},
    "chunk_simple_gla": {"q", "k", "v", "g", "g_gamma"},
    "chunk_gla": {"q", "k", "v", "g"},
    "chunk_rwkv6": {"r", "k", "v", "w", "u"},
    "chunk_gsa": {"q", "k", "v", "s", "g"},
    "chunk_delta_rule": {"q", "k", "v", "beta"},
    "chunk_gated_delta_rule": {"q", "k", "v", "g", "beta"},
    "chunk_comba": {"q", "k", "v", "p", "g", "beta"},
    "chunk_kda": {"q", "k", "v", "g", "beta"},
    "chunk_rwkv7": {"r", "w", "k", "v", "a", "b"},
    "fused_recurrent_linear_attn": {"q", "k", "v", "normalize"},
    "fused_recurrent_simple_gla": {"q", "k", "v", "g", "g_gamma"},
    "fused_recurrent_gla": {"q", "k", "v", "gk"},
    "fused_recurrent_rwkv6": {"r", "k", "v", "w", "u"},
    "fused_recurrent_gsa": {"q", "k", "v", "s", "g"},
    "fused_recurrent_delta_rule": {"q", "k", "v", "beta"},
    "fused_recurrent_gated_delta_rule": {"q", "k", "v", "g", "beta"},
    "fused_recurrent_comba": {"q", "k", "v", "p", "g", "beta"},
    "fused_recurrent_kda": {"q", "k", "v", "g", "beta"},
    "fused_recurrent_rwkv7": {"r", "w", "k", "v", "a", "b"},
}


@pytest.fixture
def handed(monkeypatch):
    """Stands in for the package; what the last operator was given."""
    seen = {}

    def operator(function):
        def run(**given):
            seen.clear()
            seen.update(given, operator=function)
            memory = given["initial_state"]
            return given["v"] * 2, memory

        return run

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for how in fla.OPERATOR.values():
        there = ModuleType(f"fla.ops.{how.module}")
        for function in (how.function, how.of_one_token().function):
            setattr(there, function, operator(function))
        monkeypatch.setitem(sys.modules, there.__name__, there)
    return seen


@pytest.mark.parametrize("name", fla.rows())
def test_an_operator_is_handed_everything_by_its_own_names(name, handed):
    row, tokens, constants = make(name, b=1, t=7, h=2, k=4, v=6)
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    M = start(name, row, tokens, constants, n=2)
    o, last = fla.recurrence(row, tokens, constants, M, borders)
    assert set(handed) - {"operator"} <= NAMES[handed["operator"]] | COMMON
    assert handed["scale"] == 1.0 and handed["output_final_state"] and handed["cu_seqlens"].dtype == torch.int64
    given = {**tokens, **constants}
    mine = {n: x for n, x in handed.items() if isinstance(x, torch.Tensor) and n not in ("cu_seqlens", "initial_state")}
    renamed = {"r": "q", "w": "g", "g_gamma": "g", "p": "a"}
    for n, x in mine.items():
        source = renamed.get(n, n)
        if source in given and n != "s":
            assert x is given[source], n
        else:  # what a gate frees is what is written
            torch.testing.assert_close(x, 1 - given["g"].exp())
    assert {renamed.get(n, n) for n in mine} >= set(given) - {"k"} and torch.equal(o, tokens["v"] * 2)
    torch.testing.assert_close(last.to(M.dtype), M.float().to(M.dtype))  # the memory's layout survives the way


@pytest.mark.parametrize("name", fla.rows())
def test_one_token_goes_to_the_loop_in_one_kernel(name, handed):
    row, tokens, constants = make(name, b=2, t=1, h=2, k=4, v=6)
    M = start(name, row, tokens, constants)
    o, last = fla.step(row, tokens, constants, M)
    assert handed["operator"].startswith("fused_recurrent_") and handed["cu_seqlens"] is None
    assert set(handed) - {"operator"} <= NAMES[handed["operator"]] | COMMON
    gate = next((n for n in ("gk", "w", "g_gamma", "g") if n in handed), None)
    assert (gate is None) == ("g" not in {**tokens, **constants})
    assert gate is None or handed[gate] is {**tokens, **constants}["g"]
    assert torch.equal(o, tokens["v"] * 2) and torch.equal(last.to(M.dtype), M.float().to(M.dtype))
    fla.step(row, {n: x.requires_grad_() for n, x in tokens.items()}, constants, M)
    assert handed["operator"].startswith("chunk_")  # the loop over tokens has not every gradient


def test_slots_are_two_memories(handed):
    row, tokens, constants = make("gsa", b=1, t=3, h=2, k=4, v=6)
    M = start("gsa", row, tokens, constants)
    fla.recurrence(row, tokens, constants, M)
    keys, values = handed["initial_state"]
    assert torch.equal(keys, M[..., :4].mT.float()) and torch.equal(values, M[..., 4:].float())


def test_what_is_not_there_is_said_in_one_line(monkeypatch):
    row, tokens, constants = make("mesa", b=1, t=3, h=1, k=4, v=4)
    with pytest.raises(NotImplementedError, match=r"no operator for 'mesa' here \(have linear_attention"):
        fla.recurrence(row, tokens, constants)
    monkeypatch.setitem(sys.modules, "fla", None)
    row, tokens, constants = make("gla", b=1, t=3, h=1, k=4, v=4)
    with pytest.raises(NotImplementedError, match="chunk_gla of flash-linear-attention cannot be imported") as caught:
        fla.recurrence(row, tokens, constants)
    assert "\n" not in str(caught.value)


def test_every_row_is_one_of_the_table():
    assert set(fla.rows()) <= set(LSM)


def test_ops_says_what_it_shares():
    ours, theirs = fla.ops._asdict(), reference.ops._asdict()
    assert fla.ops.kept == tuple(n for n, f in ours.items() if callable(f) and f is theirs[n])


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a GPU and flash-linear-attention",
)
@pytest.mark.parametrize("name", fla.rows())
def test_the_operators_are_the_rows(name):
    """Outputs and the last memory in bfloat16. The package's own bar is looser: gates' gradients are not asked for."""
    row, tokens, constants = make(name, b=1, t=200, h=2, k=64, v=64)
    M = start(name, row, tokens, constants)
    tokens = {n: x.float() if n == "g" else x.bfloat16() for n, x in tokens.items()}
    want = exact.recurrence(row, {n: x.double() for n, x in tokens.items()}, constants, M)
    plain = chunked.recurrence(row, tokens, {n: x.float() for n, x in constants.items()}, M.float())
    there = ({n: x.cuda() for n, x in tokens.items()}, {n: x.float().cuda() for n, x in constants.items()})
    got = fla.recurrence(row, *there, M.float().cuda())
    for what, x, y, z in zip(("o", "last"), got, plain, want, strict=True):
        assert_within_budget(x.cpu().bfloat16(), y, z, f"{name} {what}")
