"""What models are asked for: hidden tokens, who they are by their numbers in the run, whoever holds them."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import generate
import train as trainer
from data.corpus import BYTES, START, VOCABULARY, Document
from data.stream import Batch, Stream
from inputs import HERE
from parallel import lasp, mesh, testing
from processes import SMALL, checkpoint, run, text
from ranks import prepared
from reference.head import IGNORED
from reference.model import looks_ahead
from reference.objective import Masks, objective
from reference.ops import ops
from reference.presets import Model
from reference.routers import ROUTER
from test_experts import ALONE, config_of, same, steps, values
from test_experts import STREAM as TEXT

DOCUMENTS = [Document(str(i), bytes((7 * i + j) % BYTES for j in range(9 + i))) for i in range(8)]
STREAM = Stream(DOCUMENTS, 6, 0)
MASKED = trainer.Train(objective="masked", mask_rate=0.4, length=6, model=Model(pattern="LN", lsm="gla"))
MASKS = Masks(0.4, 3, BYTES, VOCABULARY)


def posed(tokens, index, masks=MASKS):
    return objective("masked").pose(tokens, torch.full_like(tokens, 5), index, masks)


# ------------------------------------------------------------------------------------------------- what is hidden


@given(first=st.integers(0, 60), rows=st.integers(1, 5), key=st.integers(0, 99), data=st.data())
def test_masks_know_no_cut(first, rows, key, data):
    """Of samples alone, of segments on any number of ranks, and of the whole."""
    batch, ranks = STREAM.batch(range(first, first + rows)), data.draw(st.integers(1, 4))
    whole = trainer.posed(MASKED, batch, key)
    alone = [trainer.posed(MASKED, STREAM.batch([first + i]), key) for i in range(rows)]
    ranks = data.draw(st.integers(1, 4))
    cut = [
        trainer.posed(MASKED, lasp.cut(STREAM.batch(range(first, first + rows)), ranks, r), key) for r in range(ranks)
    ]
    for name in ("tokens", "labels"):
        for parts in (alone, cut, [lasp.cut(whole, ranks, r) for r in range(ranks)]):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))


@given(t=st.integers(1, 40), rate=st.floats(0.01, 0.99), key=st.integers(0, 99), seed=st.integers(0, 99))
def test_hidden_words_are_asked_for_and_leave_no_trace(t, rate, key, seed):
    rng = torch.Generator().manual_seed(seed)
    words, others = (torch.randint(BYTES, (1, t), generator=rng) for _ in range(2))
    words[torch.rand(1, t, generator=rng) < 0.2] = START
    index, masks = torch.randint(2**40, (1, t), generator=rng), MASKS._replace(rate=rate, key=key)
    seen, labels = posed(words, index, masks)
    hidden = labels != IGNORED
    assert torch.equal(hidden, seen == masks.mask) and not (hidden & (words == START)).any()
    assert torch.equal(torch.where(hidden, labels, seen), words)
    changed = torch.where(hidden, others, words)
    assert torch.equal(posed(changed, index, masks)[0], seen)


def test_the_share_that_is_hidden_is_the_rate():
    index = torch.arange(2**16)[None]
    for rate in (0.05, 0.15, 0.7):
        hidden = [posed(index % BYTES, index, MASKS._replace(rate=rate, key=key))[1] != IGNORED for key in (1, 2)]
        close = 5 * (rate * (1 - rate) / 2**16) ** 0.5
        assert all(abs(h.double().mean().item() - rate) < close for h in hidden)
        both = (hidden[0] & hidden[1]).double().mean().item()  # keys do not know of each other
        assert abs(both - rate**2) < close


def test_the_next_token_hides_nothing():
    batch = STREAM.batch(range(3))
    for got, wanted in zip(trainer.posed(replace(MASKED, objective="next"), batch, 0), batch, strict=True):
        assert torch.equal(got, wanted)


def test_logits_of_tokens_that_are_not_asked_for_get_no_gradient():
    batch = trainer.posed(MASKED, STREAM.batch(range(3)), 0)
    x = torch.randn(batch.tokens.numel(), VOCABULARY + 1, dtype=torch.float64).requires_grad_()
    ops.token_losses(x, torch.eye(VOCABULARY + 1, dtype=torch.float64), batch.labels.flatten()).sum().backward()
    asked = (batch.labels != IGNORED).flatten()
    assert asked.any() and not asked.all() and torch.equal(x.grad.abs().sum(-1) > 0, asked)


# ------------------------------------------------------------------------------------------------ the configuration


def test_the_vocabulary_holds_the_mask():
    assert trainer.Train().model.vocabulary == VOCABULARY and MASKED.model.vocabulary == VOCABULARY + 1
    assert replace(MASKED, model=replace(MASKED.model, vocabulary=999)).model.vocabulary == 999
    assert replace(MASKED) == MASKED


def test_what_cannot_be_is_refused_in_one_line():
    calls = {
        "unknown objective 'mask'; expected one of next, masked": lambda: objective("mask"),
        "DeltaNet has no form that runs both ways": lambda: replace(MASKED, model=Model(lsm="delta_net")),
        "mask_rate is 0; it must be above 0 and below 1": lambda: replace(MASKED, mask_rate=0),
        "gather attention over a cut sequence is causal": lambda: cut(),
        "ring attention over a cut sequence is causal": lambda: cut(attention="ring"),
        "cannot be cut with states ring": lambda: cut(attention="ulysses", states="ring"),
    }
    for said, call in calls.items():
        with pytest.raises(ValueError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    cut(attention="ulysses")
    replace(MASKED, model=Model(pattern="ND", lsm="delta_net"))


def cut(**how):
    trainer.refuse_to_cut(MASKED, mesh.Mesh(sequence_size=2, **how))


def test_no_router_is_said_to_look_ahead(recwarn):
    looks_ahead.cache_clear()
    router = next(name for name, row in ROUTER.items() if row.pooled == "always")
    model = Model(pattern="LE", lsm="gla", router=router, width=8, heads=2, expert_width=4)
    prepared(replace(MASKED, model=model))
    assert not [w for w in recwarn if "looks ahead" in str(w.message)]


# -------------------------------------------------------------------------------------------------------- training

DEGREES = [
    mesh.Degrees(sequence=2, attention="ulysses", expert=2),
    mesh.Degrees(tensor=2),
]


def masked(degrees=ALONE, dropout=0.1, **more) -> trainer.Train:
    config = config_of(degrees=degrees, pattern="LN", lsm="gla", dropout=dropout)
    return replace(config, objective="masked", mask_rate=0.3, **more)


def three_steps(config):
    """As `test_experts.run`; and bits of validation."""
    place, model, over, optimizer = prepared(config)
    start = values(model)
    said, grads = steps(config, place, model, over, optimizer, 0, 3)
    bits = trainer.validate(config, model, over, place, DOCUMENTS, HERE)
    return said, grads, start, [*values(model), torch.tensor(bits)]


@pytest.fixture(scope="module")
def alone():
    return three_steps(masked())


def test_three_steps_on_two_ranks_are_those_of_one_process(alone):
    for rank in testing.run(2, lambda: [three_steps(masked(degrees)) for degrees in DEGREES]):
        for got in rank:
            same(got, alone, rtol=1e-12)


def test_micro_batches_and_recomputation_change_nothing(alone):
    quiet = {"balance": {"z": 0.01}}  # routers compare within a micro-batch
    same(three_steps(masked(micro=3, recompute=True, **quiet)), three_steps(masked(**quiet)), rtol=1e-12)


def first_batch(config, place) -> Batch:
    return trainer.micro_batches(config, TEXT, trainer.feed_of(config, place), place, 0, HERE)[0]


def test_the_loss_is_a_mean_over_hidden_tokens_which_both_sides_explain():
    """By hand, from the model's logits; and a token behind a hidden one changes what is said there."""
    config = masked(dropout=0.0)
    place, model, over, optimizer = prepared(config)
    batch = first_batch(config, place)

    @torch.no_grad()
    def logits(tokens):
        return model(tokens, None, batch.positions, batch.cu_seqlens).logits

    found, hidden = logits(batch.tokens), batch.labels != IGNORED
    loss = torch.nn.functional.cross_entropy(found[hidden], batch.labels[hidden])
    ends = batch.cu_seqlens[1:].tolist()
    at, end = next((i, e - 1) for i in hidden.nonzero()[:, 1].tolist() for e in ends if i < e - 1)
    other = batch.tokens.clone()
    other[0, end] = (other[0, end] + 1) % BYTES
    assert not torch.equal(logits(other)[0, at], found[0, at])
    assert trainer.one_step(config, model, over, optimizer, [batch], 0, False).loss == pytest.approx(loss.item())


def test_a_step_without_a_hidden_token_has_no_loss():
    config = masked()
    place, model, over, optimizer = prepared(config)
    batch = first_batch(config, place)
    nothing = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
    result = trainer.one_step(config, model, over, optimizer, [nothing], 0, False)
    assert result.finite and result.loss == 0


def test_masks_of_validation_are_always_the_same():
    """Whatever the seed, the batch and the program; longer pieces only show more."""
    config = masked()
    place, model, over, _ = prepared(config)
    said = [
        trainer.validate(c, model, over, place, DOCUMENTS, HERE) for c in (config, replace(config, seed=1, batch=4))
    ]
    count = 0
    for length, rows in ((config.length, 3), (config.length, 50), (50, 1)):
        bits, asked = evaluate.bits(model.eval(), config, DOCUMENTS, length, rows)
        said += [bits] * (length == config.length)
        assert asked == (count := count or asked)
    assert said == pytest.approx([said[0]] * 4, rel=1e-12)
    assert 0.15 < count / sum(len(d.text) for d in DOCUMENTS) < 0.45


# ---------------------------------------------------------------------------------------------- the command lines


def test_a_run_goes_on_and_is_evaluated_and_does_not_write(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    ask = ["tiny", *SMALL, "--objective", "masked", "--data", text(tmp_path), "--out", out]
    ask += ["--steps", "4", "--save-every", "2", "--model.dropout", "0.1", "--model.bare"]
    done = run("train.py", *ask)
    assert done.returncode == 0, done.stderr
    whole = checkpoint(out, 4)
    with pytest.raises(ValueError, match="is a run of objective masked, and next was asked for: use another --out"):
        trainer.Folder(trainer.Train(out=str(out)), True)
    shutil.rmtree(out / "checkpoints" / "step-4")
    done = run("train.py", *ask, "--report")
    assert done.returncode == 0 and "resumed at step 2" in done.stdout, done.stderr
    assert "bits per masked token" in done.stdout and "bits per byte" not in done.stdout
    assert "no text: a model without a causal mask" in done.stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {name for line in lines for name in line}
    assert {"masked_bits", "masked_validation"} < found and not {"bits", "validation"} & found
    again = checkpoint(out, 4)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], x) for name, x in whole.items())
    with pytest.raises(SystemExit):
        said_by(monkeypatch, generate, "--run", out)
    line = capsys.readouterr().err
    assert "has no next token to write" in line and line.count("\n") == 1
    said_by(monkeypatch, evaluate, "--run", out, "--data", tmp_path / "text", "--length", 24)
    assert "bits per masked token" in capsys.readouterr().out


def said_by(monkeypatch, program, *arguments):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    program.main()
