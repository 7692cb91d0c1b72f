"""Short runs with each balancing rule: what a line says, resuming, the picture, and the README's words about it."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import balance
from balance import RULES, config_of
from reference.balance import weights_of
from reference.routers import Load, row
from train import Result

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "bench" / "results" / "balance-cpu-torch-2.13.jsonl"


def asked(monkeypatch, *arguments):
    """The program with that command line, in this process."""
    monkeypatch.setattr("sys.argv", ["balance.py", *map(str, arguments)])
    balance.main()


def result(counts, dropped=0, loss=1.0):
    """A step of one layer with these visits, each token's scores those of the counts."""
    counts = torch.tensor([counts])
    tokens = (counts.sum(-1) // 2).clamp(min=1)
    p = counts / counts.sum().clamp(min=1)
    load = {name: torch.zeros(counts.shape) for name in Load._fields}
    load |= {"counts": counts, "tokens": tokens, "probability": p * tokens[:, None]}
    load |= {"dropped": torch.tensor([[dropped, *[0] * (counts.shape[1] - 1)]])}
    load |= {"entropy": torch.special.entr(p).sum(-1) * tokens}
    return Result(1, lambda: [loss * math.log(2), 0.0, 0.0], Load(**load))


# ---------------------------------------------------------------------------------------------------------- the runs


def test_rules_differ_in_nothing_but_the_rule():
    rest = set()
    for rule in RULES.values():
        config = config_of(rule, 10, 0)
        mine, model = asdict(config), asdict(config.model)
        assert mine.pop("balance") == rule.losses and mine.pop("bias_rate") == rule.bias_rate
        assert model.pop("router") == rule.router and model.pop("top_k") == rule.top_k
        rest.add(json.dumps([{**mine, "model": None}, model]))
        weights_of(row(rule.router), config.model.groups, rule.losses)
    assert len(rest) == 1
    assert config_of(RULES["none"], 10, 0).balances() == {}


def test_a_point_is_of_all_tokens_of_its_steps():
    p = balance.point(7, [result([6, 2, 0, 0], loss=3.0), result([0, 8, 16, 0], dropped=4, loss=5.0)])
    assert p["step"] == 7 and p["bits"] == 4.0
    assert p["share"] == [[0.1875, 0.3125, 0.5, 0.0]]
    assert p["violation"] == [1.0] and p["dropped"] == [0.125] and p["visits"] == [2.0]
    one, two = (-sum(x * math.log(x) for x in shares) for shares in ((0.75, 0.25), (1 / 3, 2 / 3)))
    assert p["entropy"] == [pytest.approx((4 * one + 12 * two) / 16, abs=1e-4)]
    assert p["mean_entropy"] == [pytest.approx(-sum(x * math.log(x) for x in (0.1875, 0.3125, 0.5)), abs=1e-4)]


def test_a_layer_that_no_token_visits_has_no_violation():
    p = balance.point(1, [result([0, 0, 0, 0])])
    assert p["violation"] == [None] and p["share"] == [[0.0] * 4] and p["visits"] == [0.0]
    assert math.isnan(balance.of(p, 4)["violation"])
    assert balance.mean([None, 1.0, 3.0]) == 2.0


def test_curves_are_between_nothing_and_the_most():
    for share, visits, most in (([0.5, 0.5, 0, 0], 2.0, 1.0), ([0.25] * 4, 1.0, 0.0), ([1.0, 0, 0, 0], 0.5, 1.0)):
        p = {"violation": [4 * max(share) - 1], "visits": [visits], "entropy": [math.log(4)], "dropped": [0.3]}
        assert balance.of(p, 4) == {"violation": most, "entropy": 1.0, "dropped": 0.3}


def test_a_run_in_miniature_writes_each_rule_once_and_is_drawn(tmp_path, monkeypatch):
    text = Path(balance.__file__).read_bytes()
    documents = [balance.corpus.Document("balance.py", text[:9000])]
    monkeypatch.setattr(balance.corpus, "load", lambda path: documents)  # the library takes seconds
    out = tmp_path / "new" / "runs.jsonl"
    ask = ["run", "--steps", 3, "--every", 2, "--commit", "abc", "--out", out, "--rules"]
    asked(monkeypatch, *ask, "capacity")
    first = out.read_text()
    asked(monkeypatch, *ask, "bias", "capacity")
    assert out.read_text().startswith(first) and str(tmp_path) not in out.read_text()
    capacity, bias = map(json.loads, out.read_text().splitlines())
    assert (capacity["rule"], bias["rule"]) == ("capacity", "bias")
    assert capacity["command"].startswith("python balance.py run --steps 3") and capacity["commit"] == "abc"
    for line, k in ((capacity, 1), (bias, 2)):
        assert line["config"]["steps"] == 3 and line["config"]["model"]["top_k"] == k
        assert line["torch"] == torch.__version__ and 4 < line["held_out_bits"] < 9
        assert [p["step"] for p in line["points"]] == [2, 3]
        for p in line["points"]:
            shares = torch.tensor(p["share"])
            assert shares.shape == (2, 16) and torch.allclose(shares.sum(-1), torch.ones(2), atol=1e-3)
            assert torch.allclose(16 * shares.max(-1).values - 1, torch.tensor(p["violation"]), atol=2e-3)
            assert p["visits"] == [k, k]
            entropies = zip(p["entropy"], p["mean_entropy"], strict=True)
            assert all(0 < token <= mean + 1e-4 <= math.log(16) + 2e-4 for token, mean in entropies)
    assert all(x == 0 for p in bias["points"] for x in p["dropped"])
    assert any(x > 0 for p in capacity["points"] for x in p["dropped"])
    drawn = []
    for name in ("one.png", "two.png"):
        asked(monkeypatch, "draw", out, "--figure", tmp_path / name)
        drawn.append((tmp_path / name).read_bytes())
    assert len(drawn[0]) > 1000 and drawn[0] == drawn[1], "the same bytes every time"


WRONG = {
    "rule": (["run", "--rules", "luck", "--out", "x"], "'luck'.*'none'.*'capacity_loss'"),
    "steps": (["run", "--steps", "0", "--out", "x"], "--steps: 0 is below 1"),
    "file": (["run", "--out", "bad.jsonl"], "bad.jsonl: line 1 is no run of balance.py"),
    "no file": (["draw", "nowhere", "--figure", "x.png"], "no results at nowhere"),
    "no runs": (["draw", "empty.jsonl", "--figure", "x.png"], "no runs to draw"),
    "picture": (["draw", "empty.jsonl", "--figure", "x.txt"], ".png or .svg, found x.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    ask, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"rule": "none"}\n')
    with pytest.raises(SystemExit) as stop:
        asked(monkeypatch, *ask)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and re.search(message, said[0]), said
    assert sorted(path.name for path in Path().iterdir()) == ["bad.jsonl", "empty.jsonl"]


# ------------------------------------------------------------------------------------------------------- the picture


def recorded():
    return balance.read(RECORDED)


def test_the_picture_shows_every_rule_and_no_words_overlap():
    found = recorded()
    page = balance.picture(found)
    said = [text.get_text() for text in page.texts]
    for line in found:
        at = said.index(RULES[line["rule"]].title)
        assert said[at + 1] == balance.came_to(balance.ending(line))
    inside = page.get_window_extent()
    boxes = [(text.get_text(), text.get_window_extent()) for text in page.texts]
    for i, (one, a) in enumerate(boxes):
        assert inside.x0 <= a.x0 <= a.x1 <= inside.x1 and inside.y0 <= a.y0 <= a.y1 <= inside.y1, one
        for two, b in boxes[:i]:
            assert not a.overlaps(b), (one, two)


def test_the_busiest_expert_of_the_end_lies_lowest():
    points = [{"step": step, "share": [[0.9, 0.1, 0], [0.1, 0.3, 0.6]]} for step in (1, 100)]
    points[0]["share"] = [[0, 0, 1], [1, 0, 0]]
    assert balance.order({"points": points}) == [2, 1, 0]


# ------------------------------------------------------------------------------------------------------- the README


def section():
    """The README's words about the picture, without what is in backquotes and behind links."""
    text = " ".join((ROOT / "README.md").read_text().split())
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", re.search(r"\*\*Balancing.*?(?=\*\*Chunks against)", text)[0])


def agree(then, now):
    """Whether two configurations say the same in every field that both have: fields come and change their names."""
    if not isinstance(then, dict):
        return then == now
    return all(agree(then[name], now[name]) for name in then.keys() & now.keys())


def test_the_readme_says_what_was_recorded():
    found = recorded()
    assert sorted(line["rule"] for line in found) == sorted(RULES)
    for line in found:
        assert agree(line["config"], balance.plain(config_of(RULES[line["rule"]], 300, 0))) and line["every"] == 5
    end = {line["rule"]: balance.ending(line) for line in found}
    said, busiest = section(), {rule: f"{1 + e.violation:.1f}" for rule, e in end.items()}
    bits = [e.bits for e in end.values()]
    remark = {
        "no rule": f"{busiest['none']} times the mean",
        "idle": f"{end['none'].idle} of the 16 get less than a tenth",
        "z": f"z-loss alone does not help ({busiest['z']})",
        "losses": f"Switch's loss {busiest['switch']}, GShard's {busiest['first']}, the sequence-wise one "
        f"{busiest['sequence']}",
        "noisy": f"with noise {busiest['noisy']}",
        "choices": f"expert choice and BASE {busiest['expert_choice']}, Sinkhorn {busiest['sinkhorn']}",
        "bias": f"0.001 a step is too slow for so few steps ({busiest['bias']}), 0.01 is not ({busiest['bias_fast']})",
        "penalty": f"{end['penalty'].visits:.1f} experts a token",
        "dropped": f"{100 * end['capacity'].dropped:.0f} % of the visits are dropped without a loss, "
        f"{100 * end['capacity_loss'].dropped:.0f} % with Switch's",
        "bits": f"from {min(bits):.2f} to {max(bits):.2f} bits per byte",
    }
    for name, words in remark.items():
        assert words in said, f"{name}: the README should say {words!r}"
    settings = {"300", "1,024", "64", "16", "32", "2", "8", "0.01", "0.001", "1.25"}
    numbers = set(re.findall(r"\d[\d,.]*\d|\d", said))
    assert numbers <= settings.union(*(re.findall(r"\d[\d,.]*\d|\d", words) for words in remark.values()))
    assert (end["expert_choice"].violation, busiest["base"]) == (0, busiest["expert_choice"])
