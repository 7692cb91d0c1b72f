"""The Triton kernels of the loss against the reference in float64: values and every gradient, and what is held.

Without a GPU they run in Triton's interpreter (float32 and float16); with one the same laws run on it, in bfloat16 too.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train as trainer
from fast import head as quick
from fast.kernels import head as kernels
from inputs import HERE, compiled_alike
from parallel import budget, mesh
from reference import example
from reference import head as plain
from reference.head import IGNORED
from reference.peak import peak
from reference.presets import Model
from test_fast_local import CUDA, DEVICE, DTYPES, draw, gpu, poisoned  # noqa: F401


def beside_one(sums, own):
    """What a head makes of the losses that has a part of the words, where all others' exponentials sum to one."""
    return torch.logaddexp(sums, torch.zeros_like(sums)) - own


def run(losses, x, head, labels, D, dtype, device):
    """Losses, dx and dhead, on the CPU."""
    leaves = [y.to(device, dtype).requires_grad_() for y in (x, head)]
    found = losses(*leaves, labels.to(device))
    return [y.cpu() for y in (found.detach(), *torch.autograd.grad(found, leaves, D.to(found)))]


def compare(dtype, x, head, labels, D, held=plain.HELD, joined=None, device=DEVICE):
    """Within the error budget and besides one rounding of each logit, which moves a loss by as much and E by E times as
    much, and of what is added up for a gradient."""
    x, head = (y.to(dtype).double() for y in (x, head))
    given, how = (x, head, labels, D), {"held": held, "joined": joined}
    of_all, by_kernels = (partial(f, **how) for f in (plain.token_losses, quick.token_losses))
    exact, wanted = run(of_all, *given, torch.float64, "cpu"), run(of_all, *given, dtype, "cpu")
    eps, logits = torch.finfo(dtype).eps, x @ head.T
    E = D[:, None].abs() * (logits.softmax(-1) + torch.nn.functional.one_hot(labels.clamp(min=0), len(head)))
    size = logits.abs().max() if logits.numel() else 0
    slack = [size, *((1 + size) * (y.max() if y.numel() else 0) for y in (E @ head.abs(), E.T @ x.abs()))]
    found = run(by_kernels, *given, dtype, device)
    for got, want, right, more, name in zip(found, wanted, exact, slack, ("losses", "dx", "dhead"), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        if got.numel():
            error, budget = example.error(got, right), example.allowed(want, right, eps) + eps * more
            assert error <= budget, f"{name} {dtype}: error {error:.1e} > budget {budget:.1e}"
    if joined is None:
        assert found[0].masked_select(labels == IGNORED).eq(0).all()
    return found


@pytest.mark.parametrize("joined", [None, beside_one])
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 9),
    words=st.integers(1, 70),
    pieces=st.integers(1, 3),
    masked=st.integers(0, 2**40),
    scale=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_losses_and_gradients(dtype, joined, n, d, words, pieces, masked, scale, seed):
    """Whatever the numbers of tokens, of a piece's, and of words; with labels that ask for nothing."""
    labels = torch.randint(words, (n,), generator=torch.Generator().manual_seed(seed))
    labels[[i for i in range(n) if masked >> i & 1]] = IGNORED
    x, head = scale * draw(n, d, seed=seed), draw(words, d, seed=seed + 1)
    compare(dtype, x, head, labels, draw(n, seed=seed + 2), -(-n // pieces) * (words + 15), joined)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size(dtype, sign):
    """Of one sign, up to 10⁴ in a row that ascends or falls: no exponential overflows, of no padding either."""
    x, head = sign * torch.tensor([[100.0], [1.0], [1e-4]]).double(), torch.linspace(1, 100, 37).double()[:, None]
    for label, held in ((0, 1), (36, 1), (20, 99), (IGNORED, 999)):
        compare(dtype, x, head, torch.tensor([label, 5, label]), draw(3), held)


def test_nothing_is_asked():
    found = compare(torch.float32, draw(5, 3), draw(20, 3), torch.full((5,), IGNORED), draw(5))
    assert all(y.eq(0).all() for y in found)


@pytest.mark.parametrize("label", [20, 2**40, -1])
def test_a_label_that_is_no_word_spoils_its_own_loss(label):
    """The interpreter would read next to the logits, or fall over."""
    labels = torch.tensor([3, label, IGNORED], device=DEVICE)
    losses = quick.token_losses(*(draw(n, 4).float().to(DEVICE) for n in (3, 20)), labels)
    assert losses.isnan().tolist() == [False, True, False]


def test_inputs_as_they_come():
    """Features between others, every other label, and one cotangent for all losses."""
    x, head, labels = draw(5, 2, 4), draw(20, 4), torch.arange(10) % 20
    ours = run(quick.token_losses, x[:, 1], head, labels[::2], torch.ones(()).expand(5), torch.float32, DEVICE)
    alone = run(quick.token_losses, x[:, 1].clone(), head, labels[::2].clone(), torch.ones(5), torch.float32, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_where_there_are_no_kernels_it_is_the_reference_itself(monkeypatch):
    """In float64, and on a CPU in bfloat16."""
    labels, asked = torch.arange(3), []
    monkeypatch.setattr(plain, "token_losses", lambda *args: asked.append(args))
    for dtype in (torch.float64, torch.bfloat16):
        given = (draw(3, 4).to(dtype), draw(20, 4).to(dtype), labels, 9, beside_one)
        quick.token_losses(*given)
        assert all(a is b for a, b in zip(asked.pop(), given, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        quick.token_losses(draw(3, 4).float(), draw(20, 4).float(), labels)
    assert len(asked) == 1


def both_ways(x, head, labels, D, held):
    """What autograd runs, one after the other, seen by who counts."""
    sums, _ = quick.summed.function(x, head, labels, held, x.dtype)
    return quick.summed_gradients.function(D, D, x, head, labels, sums, held, x.dtype)


@pytest.mark.parametrize("n, words", [(256, 512), (512, 256)])
def test_one_pieces_logits_are_there_in_their_own_dtype(n, words, monkeypatch):
    """Besides, both gradients in float32 and a piece's part of one, as is planned, and what a token has. (Triton's
    interpreter copies what it is given, so without a GPU nothing is launched.)"""
    if not CUDA:
        monkeypatch.setattr(kernels, "launch", lambda *args, **meta: None)
    d, held = 2, 2**15
    monkeypatch.setattr(budget, "HELD", held)
    asked = budget.Asked(
        Model(vocabulary=words, width=d, heads=1), 1, mesh.Degrees(), budget.Run(), budget.Assumptions()
    )
    planned = sum(budget.loss(asked, budget.Shape(n, 2, 1)).values())
    x, head = (draw(k, d).to(DEVICE, torch.float16) for k in (n, words))
    labels, D = torch.arange(n, device=DEVICE) % words, draw(n).float().to(DEVICE)
    both_ways(x, head, labels, D, held)  # compiled
    found = peak(lambda: both_ways(x, head, labels, D, held), DEVICE)
    assert planned <= found.bytes <= planned + 10 * n * 4
    assert CUDA or found.largest == 2 * held


@pytest.mark.parametrize("held, rows", [(1, [1] * 7), (2 * 32, [2, 2, 2, 1]), (3 * 32 - 1, [2, 2, 2, 1]), (999, [7])])
def test_as_many_pieces_as_held_logits_ask_for(held, rows, monkeypatch):
    """Of 20 words, which are filled up to 32."""
    seen, sums = [], kernels.sums
    monkeypatch.setattr(
        kernels, "sums", lambda logits, *args, **more: seen.append(logits.shape) or sums(logits, *args, **more)
    )
    quick.token_losses(*(draw(n, 4).float().to(DEVICE) for n in (7, 20)), torch.arange(7, device=DEVICE), held)
    assert seen == [(n, 32) for n in rows]


@gpu
def test_held_logits_are_all_that_is_allocated():
    """Under autocast, of a vocabulary that is no multiple of anything."""
    n, d, words, held = 8192, 64, 50_001, 2**25
    x, head = (draw(k, d).float().to(DEVICE).requires_grad_() for k in (n, words))
    labels = torch.arange(n, device=DEVICE)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            losses = quick.token_losses(x, head, labels, held)
        return torch.autograd.grad(losses.sum(), (x, head))

    step()
    assert peak(step, "cuda").bytes <= 2 * held + 16 * words * d + 16 * n * d


@gpu
def test_more_logits_than_32_bits_count():
    """A piece of 2³¹ and some: the last row is the first one's copy."""
    n, words = 2**14 + 1, 2**17 + 16
    x, head = (draw(k, 16).to(DEVICE, torch.bfloat16).requires_grad_() for k in (n, words))
    x.data[-1] = x.data[0]
    labels = torch.full((n,), words - 1, device=DEVICE)
    losses = quick.token_losses(x, head, labels, held=2**32)
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert losses[0] == losses[-1] and torch.equal(dx[0], dx[-1]) and dx.isfinite().all()


def test_a_compiler_sees_operators():
    torch.use_deterministic_algorithms(False)
    given = {name: draw(n, 4, seed=n).float().to(DEVICE).requires_grad_() for name, n in (("x", 5), ("head", 21))}
    labels = torch.tensor([3, 20, IGNORED, 0, 7], device=DEVICE)

    def f(x, head):
        return quick.token_losses(x, head, labels, 64).sin()

    compiled_alike(f, given)


def test_a_step_of_the_trainer_is_the_references():
    """With as many logits at once as the configuration says, in one step of a small model."""
    config = trainer.Train(
        model=Model(pattern="L", lsm="gla", width=8, heads=2, expert_width=4),
        length=16,
        batch=2,
        held_logits=9 * 272,
        device=HERE.type,
    )
    place, device = mesh.Mesh(), torch.device(DEVICE)
    ops = trainer.ops_on(replace(config, backend="reference"), place, device)
    losses = trainer.ops_on(replace(config, backend="fast"), place, device).token_losses
    assert losses.func is quick.token_losses and losses.keywords == {"held": config.held_logits}
    stream = trainer.Stream([trainer.corpus.Document("a", bytes(range(64, 128)) * 4)], config.length, 0)
    said = []
    for over in (ops, ops._replace(token_losses=losses)):
        model, matrices = trainer.model_of(config, over, place, device)
        optimizer = trainer.optimizer_of(config, model, matrices)
        batches = trainer.micro_batches(config, stream, trainer.feed_of(config, place), place, 0, device)
        result = trainer.one_step(config, model, over, optimizer, batches, 0, False)
        said.append([result.loss, result.norm])
    assert said[0] == pytest.approx(said[1], rel=1e-5)


@pytest.mark.parametrize("width", [16, 48, 272, 8192, 151936])
def test_tiles_have_32_logits_a_thread_at_the_most(width, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    N, R, C = kernels.tile_of(width)
    assert 2048 <= N * R * C <= 8192 and N * C == 2048 and (R == 1 or 2 * width > R * C)
