"""Checkpoints: what was saved comes back, on any number of ranks; killed or damaged, the one before is there."""

import os
import random
import shutil
import signal
import time
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from parallel import checkpoint, mesh, shard, testing


def build(width=5, kind=torch.optim.AdamW):
    """(model, optimizer), sharded where there are ranks to share. 5 rows over 2 or 3 ranks: uneven shards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).double()
    model.register_buffer("bias", torch.zeros(4))
    shard.shard(model, mesh.make(mesh.Degrees(), torch.device("cpu")), [model[0]])
    return model, kind(model.parameters(), lr=0.1)


def steps(model, optimizer, first: int, count: int):
    """Every rank takes the same samples, and a share of their loss."""
    ranks = mesh.make(mesh.Degrees(), torch.device("cpu")).size
    for step in range(first, first + count):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (model(x).square().sum() / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.bias += step


def values(model) -> list:
    """Parameters and buffers, whole and plain."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.state_dict().values()]
    return [x.detach().clone() for x in whole]


def start_and_save(folder, count=3, keep=2):
    model, optimizer = build()
    steps(model, optimizer, 0, count)
    checkpoint.save(folder, count, {"model": model, "optimizer": optimizer, "step": count, "skipped": 1}, keep)


def resume(folder, count=2):
    model, optimizer = build()
    state = {"model": model, "optimizer": optimizer, "step": 0, "skipped": 0}
    found = checkpoint.load(folder, state)
    at_load = values(model)
    steps(model, optimizer, state["step"], count)
    return found, state["step"], state["skipped"], at_load, values(model)


@pytest.fixture(scope="module")
def whole():
    """Values after each of five steps without interruption, in one process."""
    model, optimizer = build()
    after = [values(model)]
    for step in range(5):
        steps(model, optimizer, step, 1)
        after.append(values(model))
    return after


def same(got, want, tolerance=0.0):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def damage_of(path, at=0.5):
    """Flip one bit of the largest file."""
    file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    file.write_bytes(data)
    return file.name


def test_resumed_is_uninterrupted_to_the_bit(tmp_path, whole):
    assert checkpoint.load(tmp_path / "none", {"model": build()[0]}) is None and checkpoint.newest(tmp_path) == []
    start_and_save(tmp_path)
    found, step, skipped, at_load, after = resume(tmp_path)
    assert (found, step, skipped) == (3, 3, 1)
    same(at_load, whole[3])
    same(after, whole[5])
    model, _ = build()
    assert checkpoint.load(tmp_path, {"model": model}) == 3  # a part of what is there
    same(values(model), whole[3])


def test_any_number_of_ranks_resumes(tmp_path, whole):
    """Saved on 2 ranks, resumed on 1; saved there, resumed on 3."""
    testing.run(2, start_and_save, tmp_path)
    found, step, _, at_load, after = resume(tmp_path)
    same(at_load, whole[3], 1e-14)
    same(after, whole[5], 1e-12)
    model, optimizer = build()
    state = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoint.load(tmp_path, state)
    steps(model, optimizer, 3, 1)
    checkpoint.save(tmp_path, 4, {**state, "step": 4, "skipped": 2}, 2)
    for found, step, skipped, at_load, after in testing.run(3, resume, tmp_path, 1):
        assert (found, step, skipped) == (4, 4, 2)
        same(at_load, whole[4], 1e-12)
        same(after, whole[5], 1e-12)


def test_the_newest_few_stay_and_strays_go(tmp_path):
    model, _ = build()
    (tmp_path / "step-1.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"model": model, "step": step}, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "step-3", "step-4"}
    assert checkpoint.newest(tmp_path) == [4, 3]
    with pytest.raises(ValueError, match=r"step-4 is there already, and whole"):
        checkpoint.save(tmp_path, 4, {"model": model}, 2)
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 5, {"model": model}, 0)
    assert checkpoint.newest(tmp_path) == [4, 3]


def spoil_bit(path):
    return damage_of(path)


def spoil_first_byte(path):
    return damage_of(path, 0.0)


def spoil_end(path):
    file = next(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    return file.name


def spoil_file(path):
    (path / ".metadata").unlink()
    return ".metadata"


def spoil_manifest(path):
    (path / "manifest.json").write_text('{"half": [')
    return "manifest.json"


def spoil_all(path):
    for file in path.iterdir():
        file.unlink()
    return "manifest.json"


@pytest.mark.parametrize(
    "spoil", [spoil_bit, spoil_first_byte, spoil_end, spoil_file, spoil_manifest, spoil_all], ids=lambda f: f.__name__
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, whole, capfd, spoil):
    model, optimizer = build()
    for step in (1, 2, 3):
        steps(model, optimizer, step - 1, 1)
        checkpoint.save(tmp_path, step, {"model": model, "optimizer": optimizer, "step": step, "skipped": 0}, 5)
    file = spoil(tmp_path / "step-3")
    found, step, _, at_load, after = resume(tmp_path)
    said = capfd.readouterr().err.strip()
    assert said.count("\n") == 0 and "step-3 is damaged" in said and file in said
    assert found == step == 2
    same(at_load, whole[2])
    same(after, whole[4])
    # the step is saved again, over the damaged one, and pruning never takes what was just saved
    checkpoint.save(tmp_path, 3, {"model": model, "optimizer": optimizer, "step": 3, "skipped": 0}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    same(resume(tmp_path)[3], whole[3])


def test_a_damaged_later_one_does_not_push_out_a_whole_one(tmp_path, capfd):
    model, _ = build()
    for step in (10, 30):
        checkpoint.save(tmp_path, step, {"model": model}, 2)
    damage_of(tmp_path / "step-30")  # its size is right: only its hash tells
    checkpoint.save(tmp_path, 20, {"model": model}, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-20", "step-30"}
    assert checkpoint.load(tmp_path, {"model": model}) == 20
    damage_of(tmp_path / "step-20")
    with pytest.raises(ValueError, match=r"all checkpoints .* are damaged \(steps \[30, 20\]\)"):
        checkpoint.load(tmp_path, {"model": model})


def resume_and_listen(folder):
    return resume(folder)[:2]


def test_ranks_agree_on_what_is_damaged(tmp_path, capfd):
    testing.run(2, start_and_save, tmp_path, 1, 5)
    testing.run(2, start_and_save, tmp_path, 2, 5)
    damage_of(tmp_path / "step-2")
    assert testing.run(3, resume_and_listen, tmp_path) == [(1, 1)] * 3
    assert capfd.readouterr().err.count("step-2 is damaged") == 1


def test_another_model_is_refused_in_one_line(tmp_path):
    start_and_save(tmp_path)
    model, optimizer = build(width=6)
    before = values(model)
    with pytest.raises(
        ValueError, match=r"another shape: model\.0\.weight is \(5, 3\) there and \(6, 3\) here"
    ) as caught:
        checkpoint.load(tmp_path, {"model": model, "optimizer": optimizer})
    assert "\n" not in str(caught.value)
    same(values(model), before)
    deeper = nn.Sequential(*build()[0], nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"another model or optimizer: it has no model\.2\.weight"):
        checkpoint.load(tmp_path, {"model": deeper})
    with pytest.raises(ValueError, match=r"another model: it has model\.1\.weight, which is not here"):
        shorter = build()[0]
        shorter[1] = nn.Identity()
        checkpoint.load(tmp_path, {"model": shorter})
    model, optimizer = build(kind=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9))
    with pytest.raises(ValueError, match=r"it has no optimizer\.state\.0\.weight\.momentum_buffer"):
        checkpoint.load(tmp_path, {"model": model, "optimizer": optimizer})


def test_hyperparameters_are_those_of_the_run_not_of_the_checkpoint(tmp_path):
    start_and_save(tmp_path)
    model, _ = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.7)
    checkpoint.load(tmp_path, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["weight_decay"] == 0.7
    assert all(state["step"] == 3 for state in optimizer.state.values())


# ------------------------------------------------------------------------------------------------- in the background


def save_and_go_on(folder):
    """Saves after 1, 2 and 3 steps, each while the next is taken; the values after 5."""
    model, optimizer = build()
    inner = checkpoint.publish
    checkpoint.publish = lambda *x: (time.sleep(0.2), inner(*x))
    saver = checkpoint.Saver(folder, 5)
    for step in range(1, 6):
        steps(model, optimizer, step - 1, 1)
        if step < 4:
            saver.save(step, {"model": model, "optimizer": optimizer, "step": step, "skipped": 0})
            assert not (folder / f"step-{step}").exists() and checkpoint.newest(folder) == list(range(step - 1, 0, -1))
    saver.wait()
    checkpoint.publish = inner
    return values(model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_saved_in_the_background_is_the_state_at_that_step(tmp_path, whole, ranks):
    after = testing.run(2, save_and_go_on, tmp_path)[0] if ranks == 2 else save_and_go_on(tmp_path)
    same(after, whole[5], 1e-12)
    for step in (3, 2, 1):
        found, _, _, at_load, after = resume(tmp_path, 5 - step)
        assert found == step
        same(at_load, whole[step], 1e-12)
        same(after, whole[5], 1e-12)
        shutil.rmtree(tmp_path / f"step-{step}")


def fail_in_the_background(folder):
    model, _ = build()
    saver = checkpoint.Saver(folder, 2)
    saver.save(1, {"model": model})
    saver.wait()
    inner = checkpoint.digest

    def full(file):
        if file.name.startswith("__1_"):  # which one of two ranks alone reads
            raise OSError(28, "No space left on device", str(file))
        return inner(file)

    checkpoint.digest = full
    saver.save(2, {"model": model})
    with pytest.raises(checkpoint.Unsaved, match=r"step-2 cannot be written \(.*No space left on device"):
        saver.wait()
    assert not saver.failed()  # it was told
    saver.save(3, {"model": model})
    while not saver.failed():
        time.sleep(0.01)
    with pytest.raises(checkpoint.Unsaved, match="step-3 cannot be written"):
        saver.save(4, {"model": model})
    return checkpoint.newest(folder)


def test_an_error_in_the_background_is_told_by_the_next_call_on_every_rank(tmp_path):
    assert testing.run(2, fail_in_the_background, tmp_path) == [[1], [1]]


# ------------------------------------------------------------------------------------------------- killed inside


def save_forever(folder, first: int, mouth):
    torch.set_num_threads(1)
    model, _ = build()
    for step in range(first, first + 1000):
        nn.init.constant_(model[0].weight, step)
        checkpoint.save(folder, step, {"model": model, "step": step}, 2)
        mouth.send(step)


def killed_while_saving(folder, first: int, after: int, pause: float) -> int:
    """A process that saves step after step, killed some time into the save that follows the `after`-th; the last
    step that it had finished."""
    fork = get_context("fork")
    ear, mouth = fork.Pipe(duplex=False)
    child = fork.Process(target=save_forever, args=(folder, first, mouth))
    child.start()
    mouth.close()
    last = first - 1
    for _ in range(after):
        last = ear.recv()
    time.sleep(pause)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    while ear.poll():
        try:
            last = ear.recv()
        except EOFError:
            break
    return last


def test_killed_at_any_moment_no_finished_checkpoint_is_lost(tmp_path, capfd):
    rng, first, strays = random.Random(3), 1, 0
    start = time.perf_counter()
    checkpoint.save(tmp_path, 0, {"model": build()[0], "step": 0}, 2)
    duration = time.perf_counter() - start
    for _ in range(25):
        last = killed_while_saving(tmp_path, first, rng.choice([0, 1, 1, 2]), rng.random() * duration)
        strays += len(list(tmp_path.glob("*.tmp")))
        model, _ = build()
        state = {"model": model, "step": None}
        found = checkpoint.load(tmp_path, state)
        assert found is not None and found >= last and found == state["step"]
        assert found == 0 or bool((model[0].weight == found).all())
        assert len([step for step in checkpoint.newest(tmp_path) if step <= found]) >= min(2, found)
        first = found + 1
    assert strays > 3, "the kills never fell into a save"
    assert "damaged" not in capfd.readouterr().err
    checkpoint.save(tmp_path, first, {"model": build()[0]}, 1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{first}"]


def die_at(name: str, folder):
    """Dies inside `save`, as it calls that function of the module."""
    setattr(checkpoint, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    checkpoint.save(folder, 2, {"model": build()[0], "step": 2}, 1)


def die_removing(folder):
    def half(path):
        next(path.glob("*.distcp")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.shutil.rmtree = half
    checkpoint.save(folder, 2, {"model": build()[0], "step": 2}, 1)


def test_half_a_removed_checkpoint_is_not_called_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"model": build()[0], "step": 1}, 1)
    child = get_context("fork").Process(target=die_removing, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-1.old.tmp"}


@pytest.mark.parametrize("name", ["prepare", "quietly", "digests_of", "publish", "to_disk", "prune", "discard"])
def test_killed_between_the_steps_of_a_save(tmp_path, name):
    checkpoint.save(tmp_path, 1, {"model": build()[0], "step": 1}, 1)
    child = get_context("fork").Process(target=die_at, args=(name, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    published = name in ("prune", "discard")
    assert checkpoint.load(tmp_path, {"model": build()[0]}) == (2 if published else 1)
    checkpoint.save(tmp_path, 3, {"model": build()[0], "step": 3}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_saving_where_one_cannot_write_says_so_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("no folder")

    def attempt():
        with pytest.raises(OSError):
            start_and_save(tmp_path / "file")
        return True

    assert testing.run(2, attempt) == [True, True]
    shutil.rmtree(tmp_path)
