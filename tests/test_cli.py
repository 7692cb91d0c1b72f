"""Bad input through the real command lines: one line, exit code 2, no traceback, nothing half-written."""

import pytest

from processes import ROOT, SMALL, fresh, run, text

WRONG = {
    "no preset": ("train.py", [], "a preset comes first; expected one of tiny"),
    "unknown preset": ("train.py", ["tyni"], "tyni.*tiny"),
    "unknown option": ("train.py", ["tiny", "--stepz", "3"], "--stepz"),
    "unknown model": ("train.py", ["tiny", "--model.lsm", "glaa"], "'glaa'.*'gla'"),
    "a loss that the router has not": ("train.py", ["tiny", "--balance", "load", "1"], "Linear-MoE has no load.*noise"),
    "an unknown loss": ("train.py", ["tiny", "--balance", "swich", "1"], "'swich'.*expected some of switch, first"),
    "too few experts": ("train.py", ["tiny", "--model.top-k", "9"], "top_k 9 needs at least as many experts, got 8"),
    "unknown router": ("train.py", ["tiny", "--model.router", "best"], "'best'.*'mixtral'"),
    "unknown letter": ("train.py", ["tiny", "--model.pattern", "LXN"], "letters 'X'; allowed are L"),
    "empty pattern": ("train.py", ["tiny", "--model.pattern", ""], "allowed are L"),
    "width and heads": ("train.py", ["tiny", "--model.heads", "3"], "width 128 does not divide into 3 heads"),
    "top k": ("train.py", ["tiny", "--model.top-k", "9"], "top_k 9 needs at least as many experts, got 8"),
    "features": (
        "train.py",
        ["tiny", "--model.lsm", "linear_attention_normalized", "--model.feature-map", "identity"],
        "positive features.*elu",
    ),
    "micro": ("train.py", ["tiny", "--micro", "5"], "micro 5 must divide batch 4"),
    "steps": ("train.py", ["tiny", "--steps", "0"], "steps is 0; it must be at least 1"),
    "steps no number": ("train.py", ["tiny", "--steps", "many"], "--steps.*many"),
    "vocabulary": ("train.py", ["tiny", "--model.vocabulary", "100"], "vocabulary is 100.*at least 257"),
    "unknown objective": ("train.py", ["tiny", "--objective", "mask"], "'mask'.*'masked'"),
    "mask rate": ("train.py", ["tiny", "--mask-rate", "1"], "mask_rate is 1.0; it must be above 0 and below 1"),
    "a row of one direction": (
        "train.py",
        ["tiny", "--objective", "masked", "--model.lsm", "kda"],
        "Kimi Delta Attention has no form that runs both ways",
    ),
    "no data": ("train.py", ["tiny", "--data", "nowhere"], "nowhere"),
    "empty data": ("train.py", ["tiny", "--data", "{folder}/empty.txt"], "empty.txt.*0 bytes"),
    "binary data": ("train.py", ["tiny", "--data", "{folder}/binary.bin"], "binary.bin.*NUL"),
    "short data": ("train.py", ["tiny", "--data", "{folder}/short.txt"], "shorter than one window"),
    "no gpu": ("train.py", ["tiny", "--device", "cuda"], "no GPU was found"),
    "mesh": ("train.py", ["tiny", "--mesh.data", "2", "--mesh.sequence", "2"], "2.*2.*1"),
    "empty folder": ("train.py", ["tiny", "--data", "{folder}/nothing"], "nothing"),
    "not json": ("train.py", ["tiny", "--data", "{folder}/bad.jsonl"], "line 2|:2"),
    "fast without kernel": ("train.py", ["tiny", "--backend", "fast", "--model.lsm", "mesa"], "reference"),
    "no run": ("generate.py", ["--run", "nowhere"], "no run at nowhere"),
    "empty prompt": ("generate.py", ["--prompt", ""], "prompt is empty"),
    "temperature": ("generate.py", ["--temperature", "-1"], "temperature"),
    "no run to evaluate": ("evaluate.py", ["--run", "nowhere", "--data", "README.md"], "no run at nowhere"),
    "unknown row to learn": ("learn.py", ["grid", "--rows", "glaa", "--out", "{folder}/x"], "'glaa'.*'gla'.*'softmax'"),
    "no text to evaluate": ("evaluate.py", ["--data", "nowhere.txt"], "nowhere.txt"),
}
FRESH = ("no preset", "no run", "no run to evaluate", "unknown row to learn")  # in a process of its own, each program


def assert_one_line(done, message):
    import re

    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_gives_one_line(case, tmp_path):
    script, arguments, message = WRONG[case]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"a\0b" * 1000)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    out = ["--out", str(tmp_path / "run")] if script == "train.py" and arguments else []
    done = (fresh if case in FRESH else run)(script, *(a.format(folder=tmp_path) for a in arguments), *out)
    assert_one_line(done, message)
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_the_batch_can_feed(tmp_path):
    arguments = ["tiny", *SMALL, "--out", tmp_path / "run", "--data", text(tmp_path), "--batch", "5"]
    done = run("train.py", *arguments, ranks=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    assert said == ["train.py: 2 data ranks cannot share a batch of 5 samples: the batch must be a multiple"]


def test_a_router_with_a_capacity_and_a_cut_sequence(tmp_path):
    arguments = ["tiny", *SMALL, "--out", tmp_path / "run", "--data", text(tmp_path), "--mesh.sequence", "2"]
    done = run("train.py", *arguments, "--model.router", "switch", "--model.top-k", "1", ranks=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    assert len(said) == 1 and "'switch' has a capacity (1.25)" in said[0] and "--mesh.sequence 1" in said[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--model.router", "base", "--model.top-k", "1"], "'base' routes the tokens of a sequence together"),
        (
            ["--balance", "sequence", "0.1"],
            "sequence-wise balance loss of router 'linear_moe' is one of whole sequences",
        ),
    ],
)
def test_routers_and_losses_of_whole_sequences_and_a_cut_sequence(tmp_path, asked, message):
    arguments = ["tiny", *SMALL, "--out", tmp_path / "run", "--data", text(tmp_path), "--mesh.sequence", "2"]
    done = run("train.py", *arguments, *asked, ranks=2)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    assert len(said) == 1 and message in said[0] and "--mesh.sequence 1" in said[0]


def test_a_checkpoint_of_another_shape_and_its_folder_stays_as_it_was(tmp_path):
    arguments = ["tiny", *SMALL, "--out", tmp_path / "run", "--data", text(tmp_path), "--steps", "2"]
    assert run("train.py", *arguments).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert_one_line(run("train.py", *arguments, "--model.width", "32"), r"shape|\(")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_help_documents_every_field():
    done = run("train.py", "tiny", "--help")
    assert done.returncode == 0 and "gated_delta_net" in done.stdout and "(undocumented)" not in done.stdout


def test_the_readmes_commands_exist():
    """Every script, option and make target that the README names."""
    import re

    readme = (ROOT / "README.md").read_text()
    lines = [line.split("#")[0].split() for line in readme.splitlines() if line.startswith(("    make ", "    .venv/"))]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known, seen = {}, 0
    for words in lines:
        if words[:1] == ["make"]:
            assert words[1] in targets, words
        for i, word in enumerate(words):
            if not word.endswith(".py"):
                continue
            assert (ROOT / word).is_file(), words
            inner = words[i + 1 :]
            ask = [x for x in inner[:1] if not x.startswith("-")]  # a preset or a subcommand
            key = (word, *ask)
            if key not in known:
                done = run(word, *ask, "--help")
                assert done.returncode == 0, done.stderr
                known[key] = done.stdout
            for option in (x for x in inner if x.startswith("--")):
                assert re.search(rf"{option}\b", known[key]), (word, option)
                seen += 1
    assert seen > 5
