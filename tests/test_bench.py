"""The benchmark runs, says what it leaves out, and its drift report sees a drift."""

import json

import pytest
import torch

import bench
from parallel import comm, testing
from reference import chunked


def lines(tmp_path, *arguments):
    out = tmp_path / "lines.jsonl"
    bench.main([*arguments, "--threads", "1", "--out", str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()
    return found


def test_the_reference_is_measured_at_every_length(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "AVERAGED", 128)
    found = lines(tmp_path, "reference", "--rows", "rwkv6", "--tokens", "64", "128", "--budget", "60")
    said = {(x["side"], x["what"], x.get("tokens")) for x in found if "eager_ms" in x}
    sides = {(side, what, t) for side in bench.SIDES for what in bench.TENSORS for t in (64, 128)}
    assert said == sides | {("decode step", "forward", None)}
    assert all(x["eager_ms"] > 0 and x["peak_mib"] > 0 for x in found if "eager_ms" in x)
    (mean,) = (x for x in found if x["side"] == "geometric mean")
    assert mean["row"] == "1 of 1 rows"
    (ratio,) = (x for x in found if x["side"] == "token loop / chunked" and x["tokens"] == 128)
    assert abs(mean["ratio"] / ratio["ratio"] - 1) < 1e-9
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in table] == [["rwkv6", "64"], ["rwkv6", "128"]]


def test_what_does_not_fit_is_skipped_and_said(tmp_path, capsys):
    found = lines(tmp_path, "reference", "--rows", "gla", "--tokens", "16", "32", "--budget", "0")
    skipped = {(x["side"], x["of"], x["tokens"]) for x in found if x["what"] == "skipped"}
    assert skipped == {(side, what, 32) for side in bench.SIDES for what in bench.TENSORS}
    assert all("budget of 0 s" in x["reason"] for x in found if x["what"] == "skipped")
    assert capsys.readouterr().out.splitlines()[-1].split()[2:6] == ["skipped", "skipped", "-", "skipped"]


def test_a_row_that_cannot_run_is_said_and_the_others_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no chunk form\nof this row")

    monkeypatch.setitem(bench.SIDES, "chunked", refuse)
    found = lines(tmp_path, "reference", "--rows", "gla", "--tokens", "16", "--budget", "1")
    assert {x["side"] for x in found if x["what"] == "unavailable"} == {"chunked"}
    assert {x["side"] for x in found if "eager_ms" in x} == {"token loop", "decode step"}
    monkeypatch.setattr(chunked, "recurrence", refuse)
    (found,) = lines(tmp_path, "drift", "--rows", "gla", "--tokens", "16")
    assert found["what"] == "unavailable" and found["reason"] == "NotImplementedError: no chunk form"


def test_drift_is_seen_where_it_is(tmp_path, monkeypatch):
    rows = ("linear_attention_normalized", "lightning", "gla")
    short = ("drift", "--rows", *rows, "--tokens", "300", "--size", "8")
    settings = {x["row"]: list(x["settings"]) for x in lines(tmp_path, *short)}
    assert list(settings.values()) == [["ordinary"], ["ordinary", "lasting"], list(bench.SETTINGS)]
    assert all(x["verdict"] == "within budget" for x in lines(tmp_path, *short))
    right = chunked.recurrence

    def drifting(row, tokens, constants):
        o, M = right(row, tokens, constants)
        return o * (1 + 1e-4 * torch.linspace(0, 1, o.shape[1])[:, None, None] ** 4), M

    monkeypatch.setattr(chunked, "recurrence", drifting)
    for line in lines(tmp_path, *short):
        assert line["verdict"] == "BUDGET EXCEEDED"
        for x in line["settings"].values():
            assert x["last"] > 1 and x["last"] > 3 * x["first"] and x["memory"] <= 1
    monkeypatch.setattr(chunked, "recurrence", lambda *x: (right(*x)[0], right(*x)[1] * torch.nan))
    assert all(x["verdict"] == "BUDGET EXCEEDED" for x in lines(tmp_path, *short))


def test_floors_of_kernels():
    """Four tensors forward and eleven with backward; Mamba's, of one head, and its exponentials."""
    _, tokens, constants = bench.inputs("linear_attention", 2, 4, 3, 16, torch.bfloat16, as_layers=True)
    unit = tokens["v"].nbytes
    assert [bench.moved(what, tokens, tokens["v"]) / unit for what in bench.TENSORS] == [4, 11]
    row, tokens, constants = bench.inputs("mamba", 2, 4, 3, 16, torch.bfloat16, as_layers=True)
    assert tokens["v"].shape == (2, 4, 1, 96) and tokens["k"].shape == (2, 4, 1, 16)
    assert tokens["dt"].dtype == torch.float32 and tokens["v"].dtype == torch.bfloat16
    assert bench.moved("forward", tokens, tokens["v"]) == 2 * 4 * (2 * 16 * 2 + 96 * (2 + 2 + 4))
    exps = [bench.exponentials(what, row, tokens, constants) for what in bench.TENSORS]
    assert exps == [2 * 4 * 96 * 16, 2 * 2 * 4 * 96 * 16]
    assert bench.inputs("mamba", 1, 2, 3, 16, torch.float32)[1]["v"].shape == (1, 2, 3, 16)  # on a CPU as all others


@pytest.fixture
def slow_motion(monkeypatch):
    """Every run once and 0.5 ms; without a GPU there is no graph, and a cache that is emptied means nothing."""

    def once(run):
        run()
        return [0.5, 0.5, 0.5]

    monkeypatch.setattr(bench, "median", once)
    monkeypatch.setattr(bench, "captured", lambda run: run)


CEILING = {"copy_gb_s": 1000.0, "exponentials_g_s": 1.0}
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off on a GPU")


def one_tokens(name, side, step, batches=(1, 3), sizes=(2, 16)):
    return list(bench.decoded(name, side, step, batches, torch.float32, CEILING, sizes, "cpu"))


@needs_interpreter
@pytest.mark.parametrize("name", ["linear_attention", "gla", "gated_delta_net", "rwkv7", "mamba"])
def test_decoding_is_checked_and_measured_in_every_batch(name, slow_motion):
    from fast import recurrence as quick

    checked, *lines = one_tokens(name, "ours", quick.step)
    assert checked["what"] == "decode budget" and set(checked["error_over_budget"]) == {"o", "memory"}
    assert [x["shape"] for x in lines] == ["B1 T1 H2 D16", "B3 T1 H2 D16"] and {x["what"] for x in lines} == {"decode"}
    for b, x in zip((1, 3), lines, strict=True):
        row, tokens, constants = bench.inputs(name, b, 1, 2, 16, torch.float32, as_layers=True)
        memory = bench.memory_of(row, tokens, constants)
        assert x["memory_mib"] == memory.numel() * 4 / 2**20
        assert x["floor_bytes"] == 2 * memory.nbytes + sum(y.nbytes for y in tokens.values()) + tokens["v"].nbytes
        assert x["eager_ms"] == x["eager_here_ms"] == x["graph_ms"] == 0.5 / bench.LAYERS
        assert abs(x["floor_share"] * x["graph_ms"] / max(x["floor_ms"], x["exponentials_ms"]) - 1) < 1e-9
        assert x["peak_mib"] >= x["memory_mib"]
        assert f"{x['shape']:20} decode" in bench.as_text(x) and "% of the floor" in bench.as_text(x)


def test_a_wrong_step_is_seen_and_a_missing_one_said(slow_motion):
    def wrong(*given):
        o, M = bench.exact.step(*given)
        return o * 1.01, M

    assert one_tokens("gla", "wrong", wrong)[0]["what"] == "DECODE BUDGET EXCEEDED"
    lines = one_tokens("mesa", "fla", bench.STEPS["fla"])
    assert {(x["what"], x["of"]) for x in lines} == {("unavailable", "decode")} and len(lines) == 2
    assert "no operator for 'mesa'" in bench.as_text(lines[0])
    assert one_tokens("gla", "ours", wrong, batches=()) == []


def over_two_ranks(tmp_path, *arguments) -> list[dict]:
    """Lines of the first of two ranks; the second writes none."""

    def both():
        out = tmp_path / f"{comm.rank(comm.world())}.jsonl"
        bench.main(["parallel", "--device", "cpu", "--preset", "tiny", "--times", "2", *arguments, "--out", str(out)])
        return [json.loads(line) for line in out.read_text().splitlines()]

    first, second = testing.run(2, both)
    assert second == [] and all(x["ranks"] == 2 for x in first)
    return first


def test_a_cut_sequence_is_measured_beside_a_rank_alone(tmp_path):
    """Each way a line by the first of two ranks, what a rank received in it."""
    sizes = ["--tokens", "64", "128", "--softmax-tokens", "64", "--heads", "2", "--size", "8"]
    first = over_two_ranks(tmp_path, "--what", "layers", "--rows", "gla", *sizes)
    said = {(x["row"], x["side"], x["tokens"]): x for x in first}
    assert set(said) == {("gla", how, t) for how in ("alone", "gather", "ring") for t in (64, 128)} | {
        ("softmax", how, 64) for how in ("alone", "gather", "ring", "ulysses")
    }
    assert all(x["eager_ms"] > 0 and x["share"] > 0 for x in first)
    assert all((x["received_bytes"] > 0) == (x["side"] != "alone") for x in first if x["side"] != "ring")
    states = [said["gla", "gather", t]["received_bytes"] for t in (64, 128)]
    assert states[0] == states[1]  # does not know the length


def test_steps_and_experts_over_ranks_are_measured_beside_one_alone(tmp_path):
    sizes = ["--step-tokens", "32", "--steps", "1", "--expert-tokens", "32", "64"]
    first = over_two_ranks(tmp_path, "--what", "steps", "experts", "--rows", "mamba2", *sizes)
    steps, experts = ([x for x in first if (x["what"] == "step") == wanted] for wanted in (True, False))
    assert [x["side"] for x in steps] == ["alone", "data", "sequence"]
    assert all(x["tokens_s"] == x["used"] * 32 / x["eager_ms"] * 1e3 for x in steps)
    assert [x["used"] for x in steps] == [1, 2, 2] and all(0 < y < 10 for x in steps for y in x["loss"])
    alone = steps[0]["tokens_s"]
    assert [x["share"] for x in steps] == [x["tokens_s"] / x["used"] / alone for x in steps]
    ways = ("alone", "gather", "pair", "rank")
    assert [(x["side"], x["tokens"]) for x in experts] == [(side, n) for n in (32, 64) for side in ways]
    weights, rows = ([x["received_bytes"] for x in experts if x["side"] == side] for side in ("gather", "pair"))
    assert weights[0] == weights[1] > 0 and 1.5 < rows[1] / rows[0] < 2.5


def test_every_mesh_of_two_takes_the_same_samples(tmp_path):
    sizes = ["--samples", "4", "--sample-tokens", "16", "--steps", "1", "--rows", "mamba2"]
    lines = over_two_ranks(tmp_path, "--what", "meshes", *sizes)
    assert {x["side"]: x["used"] for x in lines if x["side"] != "pipeline"} == {"alone": 1} | dict.fromkeys(
        ("data", "experts by pair", "experts by rank", "tensor", "tensor, tokens cut between", "sequence"), 2
    )
    assert all(4 < x["loss"][0] < 7 for x in lines)  # they start alike but for random numbers
    assert all(x["tokens_s"] == 64 / x["eager_ms"] * 1e3 and x["share"] > 0 for x in lines)


def test_what_has_no_time_or_no_memory_is_said_and_the_rest_goes_on(tmp_path, monkeypatch):
    sizes = ["--tokens", "16", "32", "--heads", "2", "--size", "4", "--what", "layers", "--rows", "gla"]
    found = over_two_ranks(tmp_path, *sizes, "--seconds", "0")
    assert {x["what"] for x in found} == {"skipped"} and "0 s are left" in found[0]["reason"]
    (tmp_path / "0.jsonl").unlink()
    right = bench.mixer

    def short(ranks, name, how, shape):
        """Of one rank's memory."""
        if how == "alone" and name == "gla" and comm.rank(ranks.group) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has little")
        return right(ranks, name, how, shape)

    monkeypatch.setattr(bench, "mixer", short)
    found = {(x["row"], x["side"], x["tokens"]): x for x in over_two_ranks(tmp_path, *sizes)}
    first, second = (found.pop(("gla", "alone", t)) for t in (16, 32))
    assert (first["what"], second["what"]) == ("out of memory", "skipped")
    assert first["reason"] == "out of memory: CUDA out of memory. Tried to allocate 1 GiB"
    assert second["reason"] == "out of memory at 16 tokens"
    assert all(x["eager_ms"] > 0 and (x["share"] is None) == (x["row"] == "gla") for x in found.values())
