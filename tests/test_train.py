"""The trainer: a run that is interrupted, resumed, or spread over ranks is the same run."""

import json
import random
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from processes import SMALL, checkpoint, run, start, text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return text(tmp_path_factory.mktemp("corpus"))


def line(corpus, out, *more, steps=8) -> list[str]:
    return ["tiny", *SMALL, "--out", str(out), "--data", str(corpus), "--steps", str(steps), *map(str, more)]


def metrics(out: Path) -> list[dict]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    return [{k: v for k, v in x.items() if k not in ("tokens_per_second", "memory_mib")} for x in lines]


def assert_same(a: dict, b: dict, tolerance: float = 0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """Eight steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run("train.py", *line(corpus, out, "--model.dropout", 0.1, "--save-every", 2))
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_its_folder(whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "train.py", "commit.txt", "checkpoints", "loss.png", "experts.png"}
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step-6", "step-8"}
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(whole)
    assert [x["step"] for x in lines] == list(range(1, 9)) and all(x["loss"] > 0 for x in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[3]["validation_part"] > 0
    assert json.loads((whole / "config.json").read_text())["steps"] == 8


def test_killed_at_any_moment_and_resumed_is_the_same_run(corpus, whole, tmp_path):
    """SIGKILL at random moments, saves included, until the run is through: parameters and metrics to the bit."""
    out, rng = tmp_path / "run", random.Random(7)
    arguments = line(corpus, out, "--model.dropout", 0.1, "--save-every", 2)
    for _ in range(4):
        process = start("train.py", *arguments)
        target = rng.randrange(1, 7)
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= target:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert_same(checkpoint(out, 8), checkpoint(whole, 8))
    assert timeless(metrics(out)) == timeless(metrics(whole))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_line_goes_on(corpus, whole, tmp_path, name):
    out = tmp_path / "run"
    arguments = line(corpus, out, "--model.dropout", 0.1, "--save-every", 100)
    process = start("train.py", *arguments)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(name)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    if "stopped at step" in said:
        assert len(list((out / "checkpoints").iterdir())) == 1
    done = run("train.py", *arguments)
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stderr
    assert_same(checkpoint(out, 8), checkpoint(whole, 8))


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_used(corpus, whole, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for file in (out / "checkpoints" / "step-8").rglob("*.distcp"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :] = b""
        file.write_bytes(data)
    done = run("train.py", *line(corpus, out, "--model.dropout", 0.1, "--save-every", 2))
    assert done.returncode == 0, done.stderr
    assert "step-8" in done.stdout + done.stderr and "resumed at step 6" in done.stdout
    assert_same(checkpoint(out, 8), checkpoint(whole, 8))


EXACT = ["--precision", "float64", "--model.dropout", 0.1, "--save-every", 3, "--keep", 5]
EXACT += ["--model.attention", "mixture", "--model.mixer-experts", 3]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run("train.py", *line(corpus, out, *EXACT, steps=3))
    assert done.returncode == 0, done.stderr
    return out


TWO = [("--mesh.data", 2), ("--mesh.sequence", 2), ("--mesh.data", 2, "--mesh.expert", 2)]
TWO += [("--mesh.no-reshard", "--evaluate-every", 1)]  # what a look gathers and leaves is that of the next step


@pytest.mark.parametrize("more", TWO, ids=str)
def test_two_ranks_equal_one(corpus, alone, tmp_path, more):
    out = tmp_path / "run"
    done = run("train.py", *line(corpus, out, *EXACT, *more, steps=3), ranks=2)
    assert done.returncode == 0, done.stderr
    held = re.search(r"rank 0 holds ([\d,]+) of ([\d,]+) parameters of experts and ([\d,]+) of ([\d,]+)", done.stdout)
    mine, all_, *_ = (int(number.replace(",", "")) for number in held.groups())
    assert mine * 2 == all_ and done.stdout.count("rank 0 holds") == 1
    assert_same(checkpoint(out, 3), checkpoint(alone, 3), 1e-12)
    for a, b in zip(metrics(out), metrics(alone), strict=True):
        for name in ("loss", "balance", "norm", "entropy", "violation"):
            assert a[name] == pytest.approx(b[name], rel=1e-10), name


BALANCED = {
    "noise": ("--model.router", "noisy", "--balance", "importance", 0.1, "load", 0.1, "z", 0.01),
    "bias": ("--model.router", "deepseek_v3", "--balance", "sequence", 0.1, "switch", 0.1, "--bias-rate", 0.01),
    "penalty": ("--model.router", "remoe", "--balance", "penalty", 1e6),
}


@pytest.mark.parametrize("rule", BALANCED)
def test_balancing_rules_are_the_same_on_two_ranks_recomputed(corpus, tmp_path, rule):
    """Losses of totals, noise, bias and penalty: on one rank, and on two that run each block twice."""
    asked = (*EXACT, *BALANCED[rule])
    for name, more, ranks in (("one", (), 1), ("two", ("--recompute",), 2)):
        done = run("train.py", *line(corpus, tmp_path / name, *asked, *more, steps=3), ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint(tmp_path / name, 3) for name in ("one", "two"))
    assert_same(two, one, 1e-12)
    names = [n for n in one if n.endswith(("sublayers.1.inner.bias", "sublayers.1.inner.penalty"))]
    assert bool(names) == (rule != "noise") and all(one[n].abs().max() > 0 for n in names)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-9) and a["counts" if "counts" in a else "step"]
        for name, values in b["layers"].items():
            assert a["layers"][name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_use_of_experts_is_logged_by_layer(whole):
    """At every evaluation and at the end the pairs by layer and expert, whose sums are those of the scalars."""
    lines = metrics(whole)
    for logged in lines:
        assert logged["balance"] == pytest.approx(sum(logged["layers"]["switch"]) / len(logged["layers"]["switch"]))
        assert logged["violation"] == pytest.approx(max(logged["layers"]["violation"]))
    looks = [logged for logged in lines if "counts" in logged]
    assert looks[-1]["step"] == 8 and len(looks) == len([x for x in lines if "validation_part" in x]) + 1
    for logged in looks:
        for counts, worst in zip(logged["counts"], logged["layers"]["violation"], strict=True):
            assert max(counts) * len(counts) / sum(counts) - 1 == pytest.approx(worst, rel=1e-6)
    assert (whole / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_resume_on_another_number_of_ranks(corpus, tmp_path):
    for ranks, steps in ((2, 3), (1, 6)):
        done = run("train.py", *line(corpus, tmp_path / "a", *EXACT, steps=steps), ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stdout


def test_micro_batches_add_up(corpus, tmp_path):
    """Three small batches are one large one, the losses of documents and tokens included. (Others compare experts
    within a micro-batch.)"""
    balance = ("--balance", "sequence", 0.1, "z", 0.01, "--mixer-balance", 0)
    for name, more in (("one", ()), ("three", ("--micro", 2))):
        done = run("train.py", *line(corpus, tmp_path / name, *EXACT, *balance, *more, steps=3))
        assert done.returncode == 0, done.stderr
    assert_same(checkpoint(tmp_path / "three", 3), checkpoint(tmp_path / "one", 3), 1e-12)


@pytest.mark.parametrize(
    "more",
    [
        ("--recompute", "--optimizer.name", "sgd"),
        ("--optimizer.name", "adam", "--model.router", "deepseek_v3", "--model.tied"),
        ("--precision", "bf16", "--model.router", "switch", "--model.top-k", 1),
    ],
)
def test_options_train(corpus, tmp_path, more):
    done = run("train.py", *line(corpus, tmp_path / "run", *more, steps=4))
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["skipped"] == 0


def test_recomputation_changes_nothing(corpus, alone, tmp_path):
    done = run("train.py", *line(corpus, tmp_path / "run", *EXACT, "--recompute", steps=3))
    assert done.returncode == 0, done.stderr
    assert_same(checkpoint(tmp_path / "run", 3), checkpoint(alone, 3), 1e-12)


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(corpus, tmp_path):
    done = run("train.py", *line(corpus, tmp_path / "run", "--optimizer.rate", 1e30, "--patience", 3, steps=50))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the gradients of 3 steps in a row were not finite" in done.stderr
    assert metrics(tmp_path / "run")[-1]["skipped"] >= 3


@pytest.mark.parametrize("router, moved", [("deepseek_v3", "bias"), ("remoe", "penalty")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_no_parameter(router, moved):
    """Nor what balances the experts; the next step changes both."""
    import train
    from data.corpus import Document
    from data.stream import Stream
    from parallel import mesh as meshes
    from reference import ops
    from reference.model import LanguageModel, decayed, initialize
    from reference.presets import Model

    sizes = {"width": 16, "heads": 2, "experts": 4, "expert_width": 8, "groups": 1, "groups_kept": 1}
    balance = {"penalty": 1.0} if router == "remoe" else {}
    config = train.Train(model=Model(pattern="LN", router=router, **sizes), batch=2, balance=balance, bias_rate=0.1)
    model = LanguageModel(config.model, ops)
    initialize(model, 0)
    with torch.no_grad():
        model.head[5, 3] = torch.inf
    before = {n: p.clone() for n, p in model.state_dict().items()}
    optimizer = train.optimizer_of(config, model, decayed(model))
    mesh = meshes.make(meshes.Degrees(), torch.device("cpu"))
    stream = Stream([Document("a", bytes(range(200)) * 9)], config.length, 0)
    batches = train.micro_batches(config, stream, train.feed_of(config, mesh), mesh, 0, torch.device("cpu"))
    result = train.one_step(config, model, ops, optimizer, batches, 0, False)
    assert not result.finite
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    with torch.no_grad():
        model.head[5, 3] = 0
    assert train.one_step(config, model, ops, optimizer, batches, 0, False).finite
    changed = {n.split(".")[-1] for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert {moved, "head"} <= changed


def test_routers_inside_mixers_are_balanced_with_their_own_number_of_visits():
    """The gradient is that of the token losses and of 0.3 sum_e f_e P_e for each router, by hand."""
    import train
    from data.stream import Batch
    from reference import ops
    from reference.model import LanguageModel, initialize
    from reference.presets import Model

    sizes = {"width": 16, "heads": 2, "expert_width": 8, "top_k": 1, "mixer_experts": 4, "mixer_top_k": 3}
    several = {"lsm": "mamba", "projection_experts": ("input", "output"), "attention": "mixture"}
    config = train.Train(model=Model(pattern="L+DND", **sizes, **several), mixer_balance=0.3)
    model = LanguageModel(config.model, ops).double()
    initialize(model, 0)
    tokens = torch.arange(24).view(1, 24) % 7
    labels, cu = tokens.roll(-1, 1), torch.tensor([0, 24], dtype=torch.int32)
    batch = Batch(tokens, labels, torch.arange(24)[None], cu, torch.arange(24)[None])
    train.backward(config, model, ops, batch, torch.tensor(24.0), 2, 0)
    out = model(*batch[:4], index=batch.indices, key=0)
    loss, routers = out.losses.sum() / 24, 0
    for k, load in out.inside:
        for counts, probability in zip(load.counts, load.probability, strict=True):
            loss = loss + 0.3 / 2 * sum(
                4 * c.double() / (24 * k) * p / 24 for c, p in zip(counts, probability, strict=True)
            )
            routers += 1
    assert routers == 3
    names, weights = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(loss, weights)
    for name, weight, gradient in zip(names, weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_learning_rate_warms_up_and_falls_to_its_least():
    import train

    config = train.Train(steps=100, optimizer=train.Optimizer(rate=1.0, warmup=10, least=0.1))
    rates = [train.rate(config, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and all(a >= b for a, b in pairwise(rates[10:]))


def test_the_model_writes_and_is_evaluated(whole):
    ask = ["--run", whole, "--prompt", "line 1", "--tokens", "20", "--seed", "3"]
    first, again = (run("generate.py", *ask) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("line 1") and first.stdout == again.stdout
    assert "tokens/s; the state is" in first.stderr
    pieces = run("generate.py", *ask, "--chunk", "2")
    assert pieces.stdout == first.stdout
    path = whole / "train.py"
    done = run("evaluate.py", "--run", whole, "--data", path, "--length", "24")
    assert done.returncode == 0, done.stderr
    assert f"{path.stat().st_size:,} bytes" in done.stdout and "bits per byte" in done.stdout


def test_what_validation_takes_is_not_counted_as_training(monkeypatch):
    import train
    from reference.objective import objective

    class Written:
        first, goal, lines = False, objective("next"), []

        def log(self, **line):
            self.lines.append(line)

    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    config = train.Train(steps=9, batch=2, length=50, log_every=2)
    course = train.Course(config, Written(), train.Place(bar=train.tqdm(disable=True)), 0, torch.device("cpu"))
    for step in range(1, 5):
        now[0] += 1.0  # of 100 tokens
        check = (lambda: now.__setitem__(0, now[0] + 60.0) or 2.5) if step == 2 else None
        course.see(train.Result(step, lambda: [1.0, 1.0, 0.0], None), check)
    assert [(x["step"], x["tokens_per_second"], x.get("validation_part")) for x in Written.lines] == [
        (2, 100, 2.5),
        (4, 100, None),
    ]
