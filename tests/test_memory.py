"""The chunk form's memory is linear in the number of tokens, and no tensor holds a memory for each token."""

import pytest
import torch

from inputs import leaves, make
from reference import chunked, recurrence
from reference.lsm import LSM
from reference.peak import peak
from reference.recurrence import empty

K = V = 16


def forward_and_backward(run, name, t):
    row, tokens, constants = make(name, b=1, t=t, h=1, k=K, v=V, dtype=torch.float32)
    given = leaves(tokens)

    def both():
        o = run(row, tokens, constants)[0]
        return torch.autograd.grad(o, given, torch.ones_like(o), allow_unused=True)

    return both


@pytest.mark.parametrize("name", LSM)
def test_memory_grows_linearly_and_no_tensor_holds_every_memory(name):
    """A twice longer sequence holds at most twice the bytes, within 10 %; no tensor has a memory, or half of one, for
    every token. (A row whose gate is given element by element has such an input.)"""
    held = {t: peak(forward_and_backward(chunked.recurrence, name, t)) for t in (1024, 2048)}
    growth = held[2048].bytes / held[1024].bytes
    assert 1 < growth <= 2.2, f"{name}: {held[1024].bytes:,} bytes become {held[2048].bytes:,}"
    row, tokens, constants = make(name, b=1, t=2048, h=1, k=K, v=V, dtype=torch.float32)
    memories = 2048 * 4 * empty(row, tokens, constants).numel()
    given = max(4 * x.numel() for x in tokens.values())
    scores = 2048 * 4 * chunked.CHUNK
    assert held[2048].largest <= max(memories // 2, given, scores), (
        f"{name}: one tensor has {held[2048].largest:,} bytes"
    )


def test_the_meter_sees_all_pairs_and_every_memory():
    """What the law forbids is measured when it is there: scores of all pairs grow by four, memories side by side."""

    def pairs(row, x, constants):
        return (x["q"][:, :, 0] @ x["k"][:, :, 0].mT).tril() @ x["v"][:, :, 0], None

    held = {t: peak(forward_and_backward(pairs, "linear_attention", t)) for t in (512, 1024)}
    assert held[1024].bytes > 3.5 * held[512].bytes
    assert held[1024].largest == 1024 * 1024 * 4

    def memories(row, x, constants):
        return ((x["k"][..., None] * x["v"][..., None, :]).cumsum(1) * x["q"][..., None]).sum(-2), None

    assert peak(forward_and_backward(memories, "linear_attention", 512)).largest == 512 * K * V * 4


def test_the_meter_counts_each_storage_once_while_it_lives():
    x = torch.ones(100)

    def run():
        y = x[10:] + 1  # 360 bytes; views, and what was there before, cost nothing
        z = y.view(9, 10).mT[2:]
        del y
        z = z.exp()  # 288 bytes, beside y's 360
        return z.mul_(2) + 1  # 288 bytes, beside z's 288

    assert peak(run) == (360 + 288, 360)


def test_the_meter_agrees_with_the_profiler():
    """Which records every allocation of the CPU's allocator, those inside an operator too; but slowly."""
    from torch.profiler import ProfilerActivity, profile

    for name in ("gla", "kda"):
        for run in (recurrence.recurrence, chunked.recurrence):
            both = forward_and_backward(run, name, 64)
            both()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
                kept = both()
            events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
            events = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
            assert peak(both).bytes == pytest.approx(events.cumsum(0).max().item(), rel=0.05), name
            del kept
