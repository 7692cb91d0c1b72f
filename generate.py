"""Write text with a trained model: the prompt in chunks, then a token at a time, at constant memory.

    python generate.py --run runs/tiny --prompt "def main(" --tokens 300 --temperature 0.7

The text streams to standard output; tokens a second and the size of the model's state follow on standard error.
"""

import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

import command
from data import baselines, corpus
from reference.model import LanguageModel, for_writing, state_bytes
from reference.objective import objective


@dataclass(frozen=True)
class Generate:
    """Write text with a trained model."""

    run: str = "runs/tiny"
    """Folder of a run of train.py."""
    prompt: str = "import os\n"
    """What the text begins with."""
    tokens: int = 300
    """How many to write."""
    temperature: float = 0.8
    """Of the softmax; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Only the most likely tokens that make up this share."""
    seed: int = 0
    """The same seed writes the same text."""
    chunk: int = 512
    """Tokens of the prompt taken at once."""
    backend: Literal["reference", "fast"] = "reference"
    """Whose ops."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("the prompt is empty; give at least one character, such as --prompt 'import '")
        if self.tokens < 1 or self.chunk < 1:
            raise ValueError(f"tokens ({self.tokens}) and chunk ({self.chunk}) must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: expected temperature >= 0, "
                "top_k >= 0 and top_p above 0 and at most 1"
            )


def chances(
    logits: Float[Tensor, " vocabulary"], temperature: float, top_k: int, top_p: float
) -> Float[Tensor, " vocabulary"]:
    """The distribution that the next token is drawn from."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    p = (logits.double() / temperature).softmax(-1)
    order = p.sort(descending=True, stable=True).indices
    ranked = p[order]
    outside = ranked.cumsum(0) - ranked >= top_p  # the first token that passes top_p is still inside
    if top_k:
        outside[top_k:] = True
    p[order[outside]] = 0
    return p / p.sum()


@torch.no_grad()
def stream(
    model: LanguageModel, prompt: bytes, tokens: int, temperature=0.8, top_k=0, top_p=1.0, seed=0, chunk=512
) -> Iterator[tuple[int, object]]:
    """(token, state of the model) for each token written after the prompt."""
    model = for_writing(model)[0]
    device, rng = model.embedding.device, torch.Generator().manual_seed(seed)
    line = torch.tensor([[corpus.START, *prompt]], device=device)
    model.check(line)
    state = None
    for piece in line.split(chunk, 1):
        out = model(piece, state=state, keep_state=True)
        state = out.state
    for _ in range(tokens):
        logits = out.logits[0, -1].float().cpu()
        logits[corpus.BYTES :] = -torch.inf  # the start of a document is not text
        token = torch.multinomial(chances(logits, temperature, top_k, top_p), 1, generator=rng)
        yield int(token), state
        out = model(token[None].to(device), state=state, keep_state=True)
        state = out.state


def continuations(model, validation, training, device, seed=0, count=3, prompt=160, tokens=240) -> Iterator[str]:
    """What the model makes of the beginnings of validation texts, and how much of it stands in the training text."""
    text = b"\n".join(d.text for d in training)
    chosen = [d for d in corpus.without_tests(validation) or validation if len(d.text) > 4 * prompt]
    for document in chosen[:: max(len(chosen) // count, 1)][:count]:
        begin = document.text[: document.text.rfind(b"\n", 0, 4 * prompt) + 1 or prompt][-prompt:]
        written = corpus.decode([token for token, _ in stream(model, begin, tokens, temperature=0.7, seed=seed)])
        match = baselines.longest_match(written, text)
        yield (
            f"\n--- {document.name}: {len(begin)} bytes given, {tokens} written from ▌ on, of which the longest "
            f"run that stands in the training text has {match} bytes\n"
            f"{begin.decode(errors='replace')}▌{written.decode(errors='replace')}"
        )


def load(run: str, backend: str, device: str) -> tuple[LanguageModel, Any]:
    """The newest model of a run of train.py, and the run's configuration."""
    from parallel import checkpoint
    from train import Train, ops_of

    config = command.restore(Train, Path(run) / "config.json")
    ops = objective(config.objective).ops(ops_of(replace(config, backend=backend), torch.device(device)))
    with torch.device("meta"):
        model = LanguageModel(config.model, ops)
    model = model.to_empty(device=device).eval()
    if checkpoint.load(Path(run) / "checkpoints", {"model": model}) is None:
        raise ValueError(f"no checkpoint in {run}: train it first, with train.py --out {run}")
    return model, config


def main() -> None:
    config = command.read(lambda: tyro.cli(Generate, prog="generate.py", description=__doc__), "generate.py")
    with command.mistakes("generate.py"):
        model, otherwise = for_writing(load(config.run, config.backend, config.device)[0])
    if otherwise:
        print(otherwise, file=sys.stderr)
    print(config.prompt, end="", flush=True)
    options = (config.temperature, config.top_k, config.top_p, config.seed, config.chunk)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    start, count, size = None, 0, 0
    for token, state in stream(model, config.prompt.encode(), config.tokens, *options):
        start = start or time.perf_counter()
        print(text.decode(bytes([token])), end="", flush=True)
        count, size = count + 1, state_bytes(state)
    print(text.decode(b"", final=True), flush=True)
    speed = (count - 1) / max(time.perf_counter() - start, 1e-9)
    print(f"{speed:.0f} tokens/s; the state is {size:,} bytes after {count} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()
