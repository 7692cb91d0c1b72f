"""What small models learn, told apart by their rows; and the grid around it: cells, lines, resuming, the picture."""

import ast
import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import learn
from data.tasks import TASK
from learn import Cell, variants
from reference.lsm import LSM
from reference.printed import PRINTED
from reference.recurrence import delta

TINY = ("--steps", "2", "--batch", "2", "--width", "16", "--layers", "1", "--tests", "3", "--rates", "1e-2")


def line(row="gla", task="parity", seed=0, **more):
    """A line as the grid writes it."""
    cell = asdict(Cell(row, task, seed))
    title = variants()[row].title if row in variants() else row.upper()
    found = {"accuracy": 0.75, "longer": 0.5, "rate": 0.01, "seconds": 1.0, "state_bytes": 2048}
    return {**cell, "title": title, **found, **more}


def lines(file):
    return [json.loads(text) for text in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- what is learned


def small(monkeypatch, row, task, sizes, steps):
    """One layer of width 32 on a task of these sizes, trained in seconds."""
    monkeypatch.setitem(TASK, task, TASK[task]._replace(sizes=sizes))
    return learn.learn(Cell(row, task, steps=steps, batch=16, layers=1, width=32, tests=64), 1e-2)


def test_parity_needs_negative_eigenvalues(monkeypatch):
    """Trained on 16 bits, asked about 64 (2411.12537): a state that can flip counts on, others guess."""
    rows = ("delta_net_negative", "delta_net", "gla")
    flips, delta_rule, decays = (small(monkeypatch, row, "parity", {"length": 16}, 300) for row in rows)
    assert flips.accuracy > 0.95 and flips.longer > 0.9
    assert max(delta_rule.longer, decays.longer) < 0.7


def test_recall_needs_more_than_a_sum(monkeypatch):
    """Eight pairs of sixteen keys (2312.04927): one layer of a delta rule behind its convolution tells them apart."""
    sizes = {"length": 32, "pairs": 8, "keys": 16, "values": 8}
    corrects, adds = (small(monkeypatch, row, "recall", sizes, 300) for row in ("delta_net", "linear_attention"))
    assert corrects.accuracy > 0.9 and adds.accuracy < 0.6


def test_training_is_a_function_of_the_cell():
    cell = Cell("mamba2", "copying", steps=3, batch=2, width=16, tests=4)
    one, two = learn.learn(cell, 1e-2), learn.learn(cell, 1e-2)
    assert one == two and math.isfinite(one.loss)
    assert one != learn.learn(replace(cell, seed=1), 1e-2)


@pytest.mark.parametrize("feed_forward", learn.FEED_FORWARD)
@pytest.mark.parametrize("row", variants())
def test_every_row_takes_a_step(row, feed_forward):
    cell = Cell(row, "recall", steps=1, batch=2, layers=1, width=16, tests=1, feed_forward=feed_forward)
    found = learn.learn(cell, 1e-2)
    assert 0 <= found.accuracy <= 1 and found.parameters > 0 and found.state_bytes > 0


# ---------------------------------------------------------------------------------------------------------- the grid


def test_the_lines_of_the_grid_come_from_the_table(monkeypatch):
    monkeypatch.setitem(LSM, "new", LSM["kda"]._replace(title="New"))
    monkeypatch.setitem(LSM, "other", LSM["gla"]._replace(title="Other"))
    found = variants()
    deltas = {name for name, row in LSM.items() if row.update is delta}
    assert set(found) == {*set(LSM) - set(PRINTED), *(f"{name}_negative" for name in deltas), "softmax"}
    assert found["new_negative"].model == {"lsm": "new", "negative_eigenvalues": True}
    assert found["new"].model == {"lsm": "new"} and "other_negative" not in found
    assert len({variant.title for variant in found.values()}) == len(found)


def test_a_cell_is_that_model():
    config = Cell("kda_negative", "copying", layers=3, width=32, feed_forward="experts").config()
    assert config.lsm == "kda" and config.negative_eigenvalues and config.letters == "LELELE" and config.width == 32
    assert config.vocabulary == 18
    assert Cell("softmax", "parity").config().letters == "NDND"


def test_rates_are_tried_until_one_solves_and_the_best_is_kept(monkeypatch):
    got = {1.0: 0.3, 2.0: 0.6, 3.0: 0.5, 4.0: 0.995, 5.0: 1.0}
    monkeypatch.setattr(learn, "learn", lambda cell, rate, *_: learn.Learned(got[rate], 0.1 * rate, None, 7, 8))
    found = learn.line_of(Cell("gla", "parity", rates=(1.0, 2.0, 3.0)), "cpu")
    assert found["rate"] == 2.0 and found["accuracy"] == 0.6 and found["longer"] == pytest.approx(0.2)
    assert found["tried"] == {"1": 0.3, "2": 0.6, "3": 0.5}
    assert learn.line_of(Cell("gla", "parity", rates=(1.0, 4.0, 5.0)), "cpu")["tried"] == {"1": 0.3, "4": 0.995}


def test_one_rows_fault_is_its_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(learn, "learn", broken)
    found = learn.line_of(Cell("gla", "parity"), "cpu")
    assert found["reason"] == "RuntimeError: no such thing" and "accuracy" not in found


def asked(monkeypatch, *arguments):
    """The program with that command line, in this process."""
    monkeypatch.setattr("sys.argv", ["learn.py", *map(str, arguments)])
    learn.main()


def test_the_grid_writes_a_line_a_cell_once(tmp_path, monkeypatch):
    out = tmp_path / "new" / "grid.jsonl"
    ask = ["grid", "--rows", "gla", "delta_net_negative", "--tasks", "parity", "--out", out, "--commit", "abc", *TINY]
    asked(monkeypatch, *ask, "--workers", 2)
    first = lines(out)
    assert sorted(x["row"] for x in first) == ["delta_net_negative", "gla"]
    for x in first:
        assert x["task"] == "parity" and x["steps"] == 2 and x["commit"] == "abc" and 0 <= x["accuracy"] <= 1
        assert x["torch"] == torch.__version__ and x["command"].startswith("python learn.py grid --rows gla")
        assert str(tmp_path) not in json.dumps(x)
    asked(monkeypatch, *ask, "--seeds", 2)
    assert lines(out)[:2] == first and [x["seed"] for x in lines(out)[2:]] == [1, 1]
    parts = ("row", "accuracy", "longer", "loss")
    alone = {
        x["row"]: [
            learn.line_of(Cell(x["row"], "parity", 0, 2, 2, (1e-2,), 1, 16, 2, "dense", 3), "cpu")[n] for n in parts
        ]
        for x in first
    }
    assert alone == {x["row"]: [x[n] for n in parts] for x in first}, "a process of its own changes nothing"


def test_it_starts_where_there_is_no_tyro():
    """As the benchmark does: on machines with torch and little else."""
    for module in (learn, learn.command, sys.modules["bench"]):
        body = ast.parse(Path(module.__file__).read_text()).body
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        assert not names & {"tyro", "transformers", "train", "generate"}, module.__name__


WRONG = {
    "task": (["grid", "--tasks", "chess", "--out", "x"], "'chess'.*'recall'.*'parity'"),
    "steps": (["grid", "--steps", "0", "--out", "x"], "--steps: 0 is below 1"),
    "rates": (["grid", "--rates", "fast", "--out", "x"], "--rates: invalid float value: 'fast'"),
    "width": (["grid", "--heads", "3", "--out", "x"], "width 64 does not divide into 3 heads"),
    "kernels": (["grid", "--backend", "fast", "--out", "x"], "fast need --device cuda"),
    "file": (["grid", "--out", "bad.jsonl"], "bad.jsonl: line 2 is no cell of a grid"),
    "no file": (["draw", "nowhere", "--figure", "x.png"], "no results at nowhere"),
    "no cells": (["draw", "empty.jsonl", "--figure", "x.png"], "no cells to draw"),
    "picture": (["draw", "good.jsonl", "--figure", "x.txt"], ".png or .svg, found x.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    ask, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    for name, text in {"empty": "", "good": json.dumps(line()), "bad": json.dumps(line()) + "\nnot json\n"}.items():
        Path(f"{name}.jsonl").write_text(text)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(SystemExit) as stop:
        asked(monkeypatch, *ask)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and re.search(message, said[0]), said
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


# ------------------------------------------------------------------------------------------------------- the picture


def said(page):
    return [text.get_text() for text in page.axes[0].texts]


def test_the_picture_says_what_the_lines_say():
    found = [line("softmax", accuracy=0.999), line("gla", accuracy=0.513, longer=0.4), line("gla", "recall", longer=1)]
    texts = said(learn.picture([*found, line("old_row")]))
    at = [texts.index(title) for title in ("GLA", "Softmax attention", "OLD_ROW")]
    assert at == sorted(at), "the table's rows in its order, then rows that it no longer has"
    assert {"Parity", "Recall", "chance 50", "chance 6", "length 32", "length 128"} <= set(texts)
    assert "Copying" not in texts, "no line, no column"
    assert {"99", "51", "40", "100", "–"} <= set(texts), "a share is never rounded up"


def test_seeds_are_averaged_and_the_latest_line_of_each_counts():
    old = line(accuracy=0.1)
    found = learn.means([old, line(accuracy=0.6), line(seed=1, accuracy=0.8), {**old, "seed": 2, "reason": "broken"}])
    assert found["gla", "parity"].accuracy == pytest.approx(0.7)


def test_forty_rows_fit_the_picture():
    found = [line(f"a row with a long name {i}", task) for i in range(40) for task in TASK]
    page = learn.picture(found)
    inside = page.get_window_extent()
    assert 700 <= inside.width <= 850
    boxes = [(t.get_text(), t.get_window_extent()) for t in page.axes[0].texts if t.get_text()]
    for i, (one, a) in enumerate(boxes):
        assert inside.x0 <= a.x0 <= a.x1 <= inside.x1 and inside.y0 <= a.y0 <= a.y1 <= inside.y1, one
        for two, b in boxes[:i]:
            assert not a.overlaps(b), (one, two)


@pytest.mark.parametrize("name", ["tasks.png", "tasks.svg"])
def test_drawing_from_files(tmp_path, monkeypatch, name):
    for row in ("gla", "softmax"):
        (tmp_path / row).write_text(json.dumps(line(row)) + "\n")
    drawn = []
    for folder in ("one", "two"):
        figure = tmp_path / folder / name
        files = [tmp_path / row for row in ("gla", "softmax")]
        asked(monkeypatch, "draw", *files, "--figure", figure)
        drawn.append(figure.read_bytes())
    assert len(drawn[0]) > 1000 and drawn[0] == drawn[1], "the same bytes every time"
