"""Windows: what is gathered and summed by them is what the library's collectives gather and sum."""

import itertools
import time
from pathlib import Path

import pytest
import torch

from inputs import HERE
from parallel import comm, lasp, mesh, shard, testing
from parallel.window import Gather, Sum, Windows
from reference.model import LanguageModel, initialize, starts
from reference.ops import ops
from reference.presets import Model
from test_lasp import BATCHES

SIZES = {"lsm": "mamba2", "width": 8, "heads": 2, "vocabulary": 11, "experts": 4, "expert_width": 4}
SIZES["pattern"] = "LEENEE"  # blocks with two layers apart, of one size


def mapped(folder):
    """Makes windows that are files, which all ranks map."""
    made = itertools.count()

    class Mapped:
        def __init__(self, count, dtype, device, group):
            name = "-".join(map(str, torch.distributed.get_process_group_ranks(group)))
            path, rank, n = folder / f"{name}-{next(made)}", comm.rank(group), comm.size(group)
            if rank == 0:
                torch.from_file(f"{path}.whole", shared=True, size=n * count, dtype=dtype)
                Path(f"{path}.whole").rename(path)
            while not path.exists():
                time.sleep(0.001)
            self.parts = torch.from_file(str(path), shared=True, size=n * count, dtype=dtype).view(n, count)
            self.mine, self.group = self.parts[rank], group

        def meet(self):
            comm.barrier(self.group)

        def of(self, rank, start, stop):
            return self.parts[rank, start:stop]

    return Mapped


def train(degrees: mesh.Degrees, dtype: torch.dtype, times: int, windows: Windows | None):
    """Two steps; the losses, norms, and parameters after them."""
    place = mesh.make(degrees, HERE)
    model = LanguageModel(Model(**SIZES), mesh.over(ops, place)).to(dtype)
    how, said = starts(model), []
    narrow = torch.bfloat16 if dtype == torch.float32 else None
    shard.shard(model, place, model.blocks, narrow, times, windows)
    initialize(model, 5, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        for i in range(times):
            packed = BATCHES[(step + i) % 2]
            batch = lasp.cut(packed, place.sequence_size, place.sequence_rank)
            # the gradients of ranks and of backward passes differ in size, so that sums round
            labels = torch.where(batch.labels % (2 + place.data_rank + i) == 0, batch.labels, -100)
            shard.synchronize(model, i == times - 1)
            with torch.autocast(HERE.type, torch.bfloat16, enabled=narrow is not None):
                losses = model(batch.tokens, labels, batch.positions, batch.cu_seqlens, batch.indices, key=step).losses
            (losses.sum() / 7).backward()
            said.append(losses.detach().sum())
        said.append(shard.grad_norm(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(said), [p.full_tensor().detach().clone() for p in model.parameters()]


WAYS = [  # dtype, mesh, backward passes
    (torch.float32, mesh.Degrees(sequence=2, reshard=False), 1),
    (torch.float32, mesh.Degrees(), 2),
    (torch.float64, mesh.Degrees(), 1),
]


def test_a_model_trained_by_windows_is_that_of_the_library(tmp_path):
    def both():
        maker = mapped(tmp_path)
        for dtype, degrees, times in WAYS:
            windows = Windows(maker)
            yield [train(degrees, dtype, times, how) for how in (windows, None)]
            assert windows.made

    for rank in testing.run(2, lambda: list(both())):
        for (said, values), (library_said, library_values) in rank:
            torch.testing.assert_close(said, library_said, rtol=0, atol=0)
            torch.testing.assert_close(values, library_values, rtol=0, atol=0)


def test_windows_hold_what_ranks_wrote_and_sum_it_in_float32(tmp_path):
    """Three ranks, of which the later ones come late; sizes that take turns."""

    def run():
        windows, group, me = Windows(mapped(tmp_path)), comm.world(), comm.rank(comm.world())
        parts, said = [windows.part(group, block, 0) for block in range(3)], []
        for (gather, sum_), step in itertools.product(parts, range(2)):
            out = gather.allocate((3 * 4,), dtype=torch.bfloat16, device=HERE)
            mine = out[4 * me : 4 * me + 4]
            time.sleep(0.01 * me)
            mine.copy_(torch.arange(4) + 10 * me + step)
            gather(out, mine, group)
            said.append(out.float().clone())
            give = sum_.allocate((3 * 2,), dtype=torch.bfloat16, device=HERE)
            time.sleep(0.01 * me)
            give.copy_(torch.tensor([1.0, 256.0, 0.5] if me else [256.0, 1.0, 0.25]).repeat_interleave(2))
            mine = sum_.allocate((2,), dtype=torch.bfloat16, device=HERE)
            sum_(mine, give, group, comm.SUM)
            said.append(mine.clone())
        assert len(windows.made) == 4 and all(isinstance(p, Gather | Sum) for pair in parts for p in pair)
        return said

    everyone = testing.run(3, run)
    sums = (258.0, 513.0, 1.25)
    for rank, said in enumerate(everyone):
        for i, (gathered, summed) in enumerate(zip(said[::2], said[1::2], strict=True)):
            want = torch.cat([torch.arange(4) + 10 * r + i % 2 for r in range(3)]).float()
            assert torch.equal(gathered, want) and summed.dtype == torch.float32
            assert torch.equal(summed, torch.full((2,), sums[rank]))


@pytest.mark.parametrize("what", ["one GPU", "no link", "forbidden", None])
def test_all_ranks_agree_that_there_are_windows(what, monkeypatch):
    """Where two have the same GPU, one does not reach another's, or one may not map it, there are none for anybody."""

    def run():
        me = comm.rank(comm.world())

        def window(*_):
            if what == "forbidden" and me == 1:
                raise RuntimeError("pidfd_getfd: Operation not permitted")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0 if what == "one GPU" else me)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: not (what == "no link" and me == 1))
        monkeypatch.setattr("parallel.window.Symmetric", window)
        return Windows().on(comm.world())

    assert testing.run(2, run) == [what is None] * 2


def test_windows_of_a_mean_are_refused(tmp_path):
    def run():
        _, sum_ = Windows(mapped(tmp_path)).part(comm.world(), 0, 0)
        give = sum_.allocate((2,), dtype=torch.float32, device=HERE)
        with pytest.raises(ValueError, match="windows are summed"):
            sum_(give[:1], give, comm.world(), torch.distributed.ReduceOp.AVG)

    testing.run(2, run)
