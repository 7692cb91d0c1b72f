"""Loss of a trained model on a text, in bits and as perplexity, per byte or per masked token.

python evaluate.py --run runs/tiny --data README.md

Where the run's objective is masked tokens, the masks are the same for all runs of its rate.
"""

import math
from dataclasses import dataclass
from typing import Literal

import tyro
from tqdm import tqdm

import command
import generate
from data import corpus
from data.stream import evaluation
from reference.objective import objective


@dataclass(frozen=True)
class Evaluate:
    """Loss of a trained model on a text."""

    run: str = "runs/tiny"
    """Folder of a run of train.py."""
    data: str | None = None
    """A text file, a folder of them, or .jsonl (None: the validation part of the built-in corpus)."""
    text_field: str = "text"
    """Of each .jsonl line."""
    length: int = 256
    """Tokens of context at most."""
    rows: int = 16
    """Pieces taken at once."""
    backend: Literal["reference", "fast"] = "reference"
    """Whose ops."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""

    def __post_init__(self):
        if self.length < 1 or self.rows < 1:
            raise ValueError(f"length ({self.length}) and rows ({self.rows}) must be at least 1")


def bits(model, run, documents, length: int, rows: int) -> tuple[float, int]:
    """Mean of -log2 p(label) over all that the objective of this run asks for, every byte of the documents or those
    that are masked, and their number."""
    import torch

    from train import FIXED, posed

    loss, count, device = 0.0, 0, model.embedding.device
    total = sum(len(d.text) for d in documents)
    with torch.no_grad(), tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
        for batch in evaluation(documents, length, rows):
            batch, read = posed(run, batch, FIXED), int((batch.labels >= 0).sum())
            batch = type(batch)(*(x.to(device) for x in batch))
            losses = model(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens).losses
            loss, count = loss + losses.double().sum().item(), count + int((batch.labels >= 0).sum())
            bar.update(read)
    return loss / max(count, 1) / math.log(2), count


def main() -> None:
    config = command.read(lambda: tyro.cli(Evaluate, prog="evaluate.py", description=__doc__), "evaluate.py")
    with command.mistakes("evaluate.py"):
        documents = corpus.load(config.data, config.text_field)
        documents = documents if config.data else corpus.split(documents)[1]
        model, run = generate.load(config.run, config.backend, config.device)
    found, count = bits(model, run, documents, config.length, config.rows)
    loss, one = found * math.log(2), objective(run.objective).one
    print(
        f"{count:,} {one}s: {found:.4f} bits per {one}, loss {loss:.4f} nats, perplexity {math.exp(loss):.3f} a {one}"
    )


if __name__ == "__main__":
    main()
