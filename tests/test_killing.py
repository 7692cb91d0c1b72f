"""Runs that die: of killed ranks, silent ones, full disks and schedulers. Nothing is lost but the steps since the last
checkpoint, every rank that survives says one line, and the same command ends where an uninterrupted run does."""

import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

import train
from parallel import checkpoint as checkpoints
from parallel import comm
from processes import ROOT, SMALL, checkpoint, environment, forked, text
from test_train import assert_same


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return text(tmp_path_factory.mktemp("corpus"))


def line(corpus, out, *more, steps=8) -> list[str]:
    exact = ("--batch", 12, "--model.dropout", 0.1, "--precision", "float64", "--save-every", 2, "--keep", 9)
    return ["tiny", *SMALL, "--out", out, "--data", corpus, "--steps", steps, *exact, *more]


def plain(_=0):
    """Without pictures, which take longer than the steps."""
    train.Folder.plot = train.Folder.heat = lambda *_: None


def go(n: int, arguments, *patches, **how):
    """train.py on n forked ranks, each patch called with the rank first."""

    def before(rank):
        for patch in (plain, *patches):
            patch(rank)

    return forked(n, *arguments, before=before, **how)


def signalled(rank: int, place: str, step: int, name=signal.SIGKILL):
    """A patch: that rank gets a signal at a place, of a step that is under way or of a checkpoint that is written."""

    def hit(*_, **__):
        os.kill(os.getpid(), name)

    def patch(mine):
        if mine != rank:
            return
        if place == "step":  # gradients are there, nothing has moved
            one, norm = train.one_step, train.shard.grad_norm
            train.one_step = lambda *x: (setattr(train.shard, "grad_norm", hit if x[5] == step else norm), one(*x))[1]
            return
        owner = checkpoints.Writer if place == "write_data" else checkpoints
        inner = getattr(owner, place)
        of_it = lambda x: any(f"step-{step}" in str(getattr(y, "path", y)) or y == step for y in x)
        setattr(owner, place, lambda *x: hit() if of_it(x) else inner(*x))

    return patch


def slow(step: int, seconds: float):
    """A patch: that checkpoint takes so long to publish."""

    def patch(_):
        inner = checkpoints.publish
        checkpoints.publish = lambda aside, *x: (time.sleep(seconds * (f"step-{step}" in aside.name)), inner(aside, *x))

    return patch


def published(out: Path) -> list[int]:
    """Newest first; all of them whole, to the byte."""
    steps = checkpoints.published(out / "checkpoints")
    assert [checkpoints.damage(out / "checkpoints" / f"step-{step}", None) for step in steps] == [None] * len(steps)
    return steps


def assert_last_words(end, rank: int, n: int, *wanted: str):
    assert end.code == 1 and len(end.said) == 1, end
    assert end.said[0].startswith(f"train.py: rank {rank} of {n}, after step ") and "Traceback" not in end.err
    for pattern in wanted:
        assert re.search(pattern, end.said[0]), end.said[0]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """Eight steps without interruption, in one process, with checkpoints that are waited for."""
    out = tmp_path_factory.mktemp("whole") / "run"
    (end,) = go(1, line(corpus, out, "--no-save-in-background"))
    assert end.code == 0, end.err
    return out


# ----------------------------------------------------------------------------------------------- on another mesh

WALK = [(1, 1), (2, 2), (1, 3), (4, 1), (1, 2), (3, 1)]  # data x sequence, one a step


def stopped_at(last: int):
    """A patch: a stop is asked for in the step that makes it `last` steps."""

    def patch(_):
        one = train.one_step
        train.one_step = lambda *x: one(*x[:-1], x[-1] or x[5] + 1 == last)

    return patch


def test_a_run_that_changes_its_mesh_at_every_step_is_the_same_run(corpus, whole, tmp_path):
    """Saved on each mesh of 1, 2, 3 and 4 ranks, loaded on another: to more and to fewer, of data and of sequence."""
    for step, (data, sequence) in enumerate(WALK, 1):
        mesh = ("--mesh.data", data, "--mesh.sequence", sequence, "--save-every", 100)
        for end in go(data * sequence, line(corpus, tmp_path, *mesh), stopped_at(step)):
            assert end.code == 0, end.err
        assert published(tmp_path)[0] == step
        if step % 2 == 0:
            assert_same(checkpoint(tmp_path, step), checkpoint(whole, step), 1e-12)


# -------------------------------------------------------------------------------------------------------- killed

KILLED = [  # rank, place, its step, and the newest checkpoint afterwards
    (1, "step", 3, 2),
    (0, "write_data", 4, 2),
    (1, "digests_of", 4, 2),
    (0, "publish", 4, 2),
    (0, "prune", 4, 4),
    (0, "step", 7, 6),
]


def test_ranks_killed_in_steps_and_in_saves_lose_nothing_that_was_saved(corpus, whole, tmp_path):
    """One run, killed again and again, of two ranks and at last of three."""
    for rank, place, step, newest in KILLED:
        waited = ("--no-save-in-background",) if place == "step" else ()  # or it might be the pending save that dies
        ends = go(2, line(corpus, tmp_path, *waited), signalled(rank, place, step))
        assert ends[rank].code == -signal.SIGKILL and not ends[rank].said
        assert_last_words(ends[1 - rank], 1 - rank, 2, r"lost the others \(.*\)", r"the same command goes on from step")
        assert published(tmp_path)[0] == newest, (rank, place)
    for end in go(3, line(corpus, tmp_path)):
        assert end.code == 0, end.err
    assert_same(checkpoint(tmp_path, 8), checkpoint(whole, 8), 1e-12)
    assert published(tmp_path) == [8, 6, 4, 2] and not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_silent_rank_ends_the_others_after_the_timeout(corpus, tmp_path):
    arguments = line(corpus, tmp_path, "--timeout", 2, "--no-save-in-background")
    stopped, *others = go(3, arguments, signalled(0, "step", 5, signal.SIGSTOP), enough=2)
    assert stopped.code is None
    for rank, end in enumerate(others, 1):
        assert_last_words(end, rank, 3, "after step 5 of 8", "silent for --timeout 2 s", "goes on from step 4$")
        assert end.seconds < 12


# --------------------------------------------------------------------------------------------------- in the background


def test_steps_go_on_while_a_checkpoint_is_written(corpus, whole, tmp_path):
    """All steps are done before the first checkpoint is published, which is that of its own step all the same."""
    (end,) = go(1, line(corpus, tmp_path, "--save-every", 6), slow(6, 1.5))
    assert end.code == 0, end.err
    logged = (tmp_path / "metrics.jsonl").stat().st_mtime
    assert logged < (tmp_path / "checkpoints" / "step-6" / "manifest.json").stat().st_mtime
    assert_same(checkpoint(tmp_path, 6), checkpoint(whole, 6))
    assert published(tmp_path) == [8, 6]


def test_a_stop_waits_for_the_pending_checkpoint_and_writes_its_own(corpus, tmp_path):
    ends = go(2, line(corpus, tmp_path), slow(2, 1.0), signalled(1, "step", 2, signal.SIGTERM))
    assert [end.code for end in ends] in ([0, 0], [1, 1]), ends
    assert published(tmp_path)[-1] == 2


def small_files(rank):
    """A patch: the last rank can write but 20,000 bytes a file, as on a disk that is full."""
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        inner = checkpoints.Writer.write_data

        def write(self, *x):
            if "step-4" in str(self.path):
                resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
            return inner(self, *x)

        checkpoints.Writer.write_data = write


@pytest.mark.parametrize(("n", "more"), [(1, ()), (2, ()), (1, ("--no-save-in-background",))])
def test_a_full_disk_ends_the_run_and_leaves_older_checkpoints(corpus, tmp_path, n, more):
    for rank, end in enumerate(go(n, line(corpus, tmp_path, *more, steps=100), small_files)):
        assert_last_words(end, rank, n, r"step-4 cannot be written \(.*File too large\)", "goes on from step 2$")
    assert published(tmp_path) == [2]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_step(corpus, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for rank, end in enumerate(go(2, line(corpus, tmp_path))):
        assert_last_words(end, rank, 2, "after step 0", "checkpoints cannot be written .*File exists", "the start")
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_only_what_the_network_says_is_a_lost_rank():
    gloo = "[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1. This is typically x"
    assert comm.lost(RuntimeError(gloo)) == "Connection closed by peer [::1]:1"
    for error in (RuntimeError("CUDA out of memory"), RuntimeError(), ValueError(gloo), OSError(28, "full")):
        assert comm.lost(error) is None


# ---------------------------------------------------------------------------------------------------- a scheduler

FAKES = {  # what the script asks of SLURM, on one host
    "srun": 'echo $$ > "$STAGE/step"; shift; exec "$@"',
    "scontrol": 'case $1 in show) echo localhost;; *) echo "$@" >> "$STAGE/asked";; esac',
    "scancel": 'echo "$@" >> "$STAGE/asked"; kill -TERM $(cat "$STAGE/step")',
}


def submitted(stage: Path, *arguments) -> subprocess.Popen:
    """The SLURM script as sbatch runs it, on one host with two processes."""
    for name, body in FAKES.items():
        (stage / name).write_text(f"#!/bin/bash\n{body}\n")
        (stage / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "PROCESSES": "2"}
    where = environment() | slurm | {"STAGE": str(stage), "PATH": f"{stage}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "scripts" / "train.slurm"), *map(str, arguments)]
    return subprocess.Popen(script, env=where, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    return [json.loads(x)["step"] for x in metrics.read_text().splitlines(keepends=True) if x.endswith("\n")]


def until(true, job, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        if job.poll() is not None or time.monotonic() > end:
            job.terminate()
            raise AssertionError(job.communicate(timeout=20))
        time.sleep(0.01)


def process_of(out: Path, rank: int) -> int:
    """The process of a run's rank, by its command line and its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mine = str(out).encode() in (path / "cmdline").read_bytes()
            if mine and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank} of {out}")


def test_a_job_whose_rank_is_killed_goes_on_and_is_requeued_when_its_time_is_up(corpus, tmp_path):
    """torchrun starts the ranks anew after a SIGKILL; SLURM's signal becomes a checkpoint, of the run it was."""
    out, stage, more = tmp_path / "run", tmp_path / "stage", ("--save-every", 10, "--evaluate-every", 1000)
    stage.mkdir()
    job = submitted(stage, *line(corpus, out, *more, steps=100))
    until(lambda: (out / "metrics.jsonl").exists() and len(steps_of(out)) >= 12, job)
    os.kill(process_of(out, 1), signal.SIGKILL)
    reached = max(steps_of(out))
    until(lambda: (stage / "step").exists() and steps_of(out) and max(steps_of(out)) > reached + 5, job)
    job.send_signal(signal.SIGTERM)
    said, err = job.communicate(timeout=60)
    resumed = re.findall(r"resumed at step (\d+)", said)
    assert len(resumed) == 1 and int(resumed[0]) >= 10, said + err
    assert "lost the others" in err and "Traceback" not in "\n".join(x for x in err.splitlines() if "train.py" in x)
    assert (stage / "asked").read_text() == "--signal=TERM 4711\nrequeue 4711\n"
    stopped = published(out)[0]
    assert f"stopped at step {stopped} of 100" in said and stopped > reached
    exact = line(corpus, tmp_path / "whole", *more, steps=100)
    for end in go(2, exact, stopped_at(stopped)):  # two ranks, too: rounding grows over so many steps
        assert end.code == 0, end.err
    assert_same(checkpoint(out, stopped), checkpoint(tmp_path / "whole", stopped), 1e-12)
