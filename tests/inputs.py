"""Inputs for every row of the table in a stable range, and the error budget by which paths are compared."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reference import example
from reference.lsm import LSM
from reference.recurrence import counted, empty, recurrence

# Where ranks compute: on CPUs, but for those that test_nccl starts on GPUs.
HERE = torch.device("cpu")
if os.environ.get("LINEAR_MOE_RANKS") == "cuda" and "LOCAL_RANK" in os.environ:
    HERE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))

SMALL = {"key_heads": 1, "levels": 4, "slots": 5, "mini_batch": 3}


def make(name, b=2, t=13, h=2, k=4, v=5, seed=0, dtype=torch.float64, strength=1.0):
    """(row, tokens, constants): unit keys, log-sigmoid gates times `strength`, write strengths in (0, 2)."""
    gates = {n: lambda x, n=n: example.DRAWN[n](x) * strength for n in example.GATES}
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v, "m": 3}
    return LSM[name], *example.inputs(LSM[name], sizes, seed, dtype, {**example.DRAWN, **gates})


def small(lsm, key_size=4, value_size=6):
    """Sizes for a small layer of that row: values of another size than keys, where the row allows it."""
    values = key_size if LSM[lsm].tokens["v"] == "b t h k" else value_size
    return {"width": 12, "heads": 2, "key_size": key_size, "value_size": values} | SMALL


def start(name, row, tokens, constants, seed=1, n=None):
    """A memory to start from; of a row whose weights have features, one that tokens wrote: no weight is negative."""
    zeros = empty(row, tokens, constants, n)
    if row.features and row.update is counted:
        M = recurrence(row, {name: x[:1].flip(1).double() for name, x in tokens.items()}, constants)[1]
        times = torch.rand(len(zeros), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
        return (times[:, None, None, None].to(M.device) * M).to(zeros.dtype)
    M = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(zeros.dtype)
    return M.abs() if row.update is counted else M


def leaves(*groups):
    """The tensors of dicts (and tensors) as leaves that want gradients, in place of the originals."""
    out = []
    for group in groups:
        if isinstance(group, dict):
            for name, x in group.items():
                if not x.is_floating_point():  # a place in a mini-batch
                    continue
                group[name] = x.detach().clone().requires_grad_()
                out.append(group[name])
    return out


def pieces(x, start, stop):
    return {name: y[:, start:stop] for name, y in x.items()}


def unpadded(state):
    """The tensors of a mixer's state. The rows of a cache end at their length: behind it there is padding."""
    if "length" not in getattr(state, "_fields", ()):
        return () if state is None else tuple(state)
    lengths = state.length.tolist()
    return (state.length, *(row[:n] for part in state[:-1] for row, n in zip(part, lengths, strict=True)))


def assert_within_budget(got, plain, exact, what=""):
    """`got` may be twice as far from `exact` (float64) as `plain`, the reference in the same dtype, plus a rounding."""
    budget = example.allowed(plain, exact, torch.finfo(got.dtype).eps)
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error = example.error(got, exact)
    assert error <= budget, f"{what}: error {error:.1e} > budget {budget:.1e}"


def compiled_alike(f, given: dict):
    """f of the leaves by name, and its gradients, in one graph each way."""
    wanted = f(**given)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(**given)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), list(given.values())) for y in (got, wanted)))


def here(*groups: dict) -> list[dict]:
    """The tensors of dicts, where ranks compute."""
    return [{name: x.to(HERE) for name, x in group.items()} for group in groups]


def refused(calls) -> list[str]:
    """What each call says, as every one of them must raise ValueError."""
    said = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        said.append(str(caught.value))
    return said


class Made(TorchDispatchMode):
    """Numbers of elements of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.sizes += [y.numel() for y in tree_leaves(out) if isinstance(y, torch.Tensor)]
        return out
