"""Plants bugs, one at a time in a copy of the repository, and shows that the laws catch each.

    python tests/mutants.py                 all of them (minutes)
    python tests/mutants.py halo rank       those whose name has one of these words

A mutant that no test catches is a hole in the tests: the exit code is the number of survivors.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("reference", "fast", "parallel", "data", "tests", "docs", "pyproject.toml")


class Mutant(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: str  # files, and -k expressions, that must turn red


MUTANTS = [
    Mutant(
        "decay off by one token",
        "reference/chunked.py",
        ".triu(1) @ g",
        ".triu(0) @ g",
        "tests/test_recurrence.py -k chunks_equal",
    ),
    Mutant(
        "0.3 % scale",
        "reference/chunked.py",
        "o = inside.reach @ before + inside.scores @ written",
        "o = inside.reach @ before + 1.003 * inside.scores @ written",
        "tests/test_recurrence.py -k chunks_equal",
    ),
    Mutant(
        "last chunk skipped",
        "reference/chunked.py",
        "return torch.stack(before, 1), written, M",
        "return torch.stack(before, 1), written, before[-1]",
        "tests/test_recurrence.py -k 'chunks_equal or carries'",
    ),
    Mutant(
        "one chunk for all tokens",
        "reference/chunked.py",
        "CHUNK = 64",
        "CHUNK = 4096",
        "tests/test_memory.py",
    ),
    Mutant(
        "transition transposed",
        "reference/recurrence.py",
        "lambda A, M: A @ M,",
        "lambda A, M: A.mT @ M,",
        "tests/test_recurrence.py -k 'span or chunks_equal'",
    ),
    Mutant(
        "adjoint not transposed",
        "reference/recurrence.py",
        "lambda A, D: A.mT @ D,",
        "lambda A, D: A @ D,",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "gradient of the transition dropped",
        "reference/recurrence.py",
        "lambda D, M: D @ M.mT,",
        "lambda D, M: 0 * (D @ M.mT),",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "spans composed in the wrong order",
        "reference/recurrence.py",
        "TRANSITION[later.kind].product(later.A, earlier.A)",
        "TRANSITION[later.kind].product(earlier.A, later.A)",
        "tests/test_recurrence.py -k span",
    ),
    Mutant(
        "delta reads before the decay",
        "reference/recurrence.py",
        '(x["v"] - look(M, x["k"])))',
        '(x["v"] - look(before, x["k"])))',
        "tests/test_recurrence.py -k chunks_equal",
    ),
    Mutant(
        "bonus read includes the token's own write",
        "reference/recurrence.py",
        'look(write(before, x["u"]',
        'look(write(M, x["u"]',
        "tests/test_recurrence.py -k chunks_equal",
    ),
    Mutant(
        "a border does not reset the span",
        "reference/recurrence.py",
        "return last._replace(A=torch.zeros_like(last.A))",
        "return last",
        "tests/test_lasp.py",
    ),
    Mutant(
        "padding leaks into the memory",
        "reference/documents.py",
        "return y.masked_fill(~valid.reshape(valid.shape + (1,) * (y.ndim - 2)), 0)",
        "return y",
        "tests/test_recurrence.py -k packed",
    ),
    Mutant(
        "taps across documents",
        "reference/local.py",
        "shift = document_of(cu_seqlens, t), torch.arange(n, device=x.device) * reach",
        "shift = 0 * document_of(cu_seqlens, t), torch.arange(n, device=x.device) * reach",
        "tests/test_local.py",
    ),
    Mutant(
        "taps reversed",
        "reference/local.py",
        "weight[:, j].to(x.dtype) * line",
        "weight[:, width - 1 - j].to(x.dtype) * line",
        "tests/test_local.py",
    ),
    Mutant(
        "attention sees one token ahead",
        "reference/attention.py",
        "seen = place <= own",
        "seen = place <= own + 1",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention's window is one token too wide",
        "reference/attention.py",
        "place > own - window",
        "place >= own - window",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention's cache forgets a token too early",
        "reference/cache.py",
        "clamp(max=window - 1)",
        "clamp(max=max(window - 2, 0))",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention over a cut sequence has no window",
        "parallel/lasp.py",
        "v[:, :first], past, **how)[0]",
        "v[:, :first], past)[0]",
        "tests/test_lasp.py -k equal_one",
    ),
    Mutant(
        "attention turns every channel",
        "reference/mixers/softmax.py",
        "int(cls.may_turn(config) * config.rope_share)",
        "cls.may_turn(config)",
        "tests/test_mixers.py -k oracles",
    ),
    Mutant(
        "latent attention's scale is that of the latent space",
        "reference/mixers/softmax.py",
        "o, past = self.ops.attention(q, k, v, past, cu_seqlens, self.window, self.scale)",
        "o, past = self.ops.attention(q, k, v, past, cu_seqlens, self.window)",
        "tests/test_mixers.py -k latent_space",
    ),
    Mutant(
        "latent attention's cache of a document goes to the next",
        "reference/cache.py",
        "type(past)(*(x[i : i + 1] for x in past))",
        "type(past)(*(x[:1] for x in past))",
        "tests/test_mixers.py -k packed",
    ),
    Mutant(
        "positions restart after a cut",
        "reference/model.py",
        "start = 0 if state is None else state.position",
        "start = 0 if state is None else 0 * state.position",
        "tests/test_model.py",
    ),
    Mutant(
        "norm's epsilon outside the root",
        "reference/local.py",
        "torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)",
        "torch.rsqrt((y * y).sum(-1, keepdim=True)).clamp(max=1 / eps)",
        "tests/test_local.py tests/test_mixers.py -k 'unit or Qwen or qwen or gated_delta or delta'",
    ),
    Mutant(
        "tie order reversed",
        "reference/routers.py",
        "return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]",
        "return values.shape[1] - 1 - values.flip(1).sort(dim=-1, descending=True, stable=True).indices[:, :k]",
        "tests/test_routers.py",
    ),
    Mutant(
        "the bias weighs, too",
        "reference/routers.py",
        "gate = scores.gather(-1, index)",
        "gate = (scores if bias is None else scores + bias).gather(-1, index)",
        "tests/test_routers.py tests/test_moe.py",
    ),
    Mutant(
        "balance loss counted twice",
        "reference/routers.py",
        "return overlap * counts_total.shape[-1] / (k * N.square())",
        "return 2 * overlap * counts_total.shape[-1] / (k * N.square())",
        "tests/test_routers.py",
    ),
    Mutant(
        "the bias moves the wrong way",
        "reference/routers.py",
        "return bias + rate *",
        "return bias - rate *",
        "tests/test_routers.py",
    ),
    Mutant(
        "documents compete for room",
        "reference/routers.py",
        "line = (document[:, None] * experts + index).flatten()",
        "line = (0 * document[:, None] + index).flatten()",
        "tests/test_routers.py tests/test_moe.py",
    ),
    Mutant(
        "experts' rows not put back",
        "reference/moe.py",
        ".index_select(0, order.argsort())",
        ".index_select(0, order)",
        "tests/test_moe.py",
    ),
    Mutant(
        "labels cross documents",
        "data/stream.py",
        "np.where(following == START, IGNORED, following)",
        "following",
        "tests/test_data.py",
    ),
    Mutant(
        "dropout depends on the place in the batch",
        "reference/model.py",
        "z = index[..., None] * width + torch.arange(width, device=index.device)",
        "z = torch.arange(index.numel() * width, device=index.device).view(*index.shape, width)",
        "tests/test_model.py",
    ),
    Mutant(
        "halo of the wrong end",
        "parallel/lasp.py",
        "x[:, t - new :]",
        "x[:, :new]",
        "tests/test_lasp.py",
    ),
    Mutant(
        "a border at the cut is lost",
        "parallel/lasp.py",
        "(borders >= start)",
        "(borders > start)",
        "tests/test_lasp.py",
    ),
    Mutant(
        "a rank without tokens leaves the graph",
        "parallel/lasp.py",
        "y = y + 0 * sum(x.sum() for x in inputs)",
        "pass",
        "tests/test_lasp.py",
    ),
    Mutant(
        "totals over a part of the ranks",
        "parallel/mesh.py",
        "comm.total(x, mesh.everyone)",
        "comm.total(x, mesh.sequence)",
        "tests/test_lasp.py",
    ),
    Mutant(
        "gradients averaged over ranks",
        "parallel/shard.py",
        "part.set_gradient_divide_factor(1.0)",
        "pass",
        "tests/test_lasp.py",
    ),
    Mutant(
        "the newest checkpoint pruned",
        "parallel/checkpoint.py",
        "[s for s in newest(folder) if s <= step][:keep]",
        "newest(folder)[:keep]",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "a kernel's read does not decay",
        "fast/kernels/decay.py",
        "seen = seen * reading[:, None]",
        "seen = seen * 1.0",
        "tests/test_fast.py",
    ),
    Mutant(
        "held-out samples are trained on",
        "data/tasks.py",
        "np.flatnonzero(held_out(tokens) != test)",
        "np.flatnonzero(held_out(tokens) < test)",
        "tests/test_tasks.py",
    ),
    Mutant(
        "a sample depends on its place in the batch",
        "data/tasks.py",
        "row.draw(Draw(seed, turn, indices[wrong]), **sizes)",
        "row.draw(Draw(seed, turn, wrong), **sizes)",
        "tests/test_tasks.py",
    ),
    Mutant(
        "eigenvalues stay positive",
        "reference/mixers/delta.py",
        "2 if config.negative_eigenvalues else 1",
        "1",
        "tests/test_learn.py -k parity",
    ),
]


def caught(mutant: Mutant) -> bool:
    """Whether a test turns red. Raises if the line to break is not there, once and no more."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
            copy(ROOT / part, Path(folder) / part)
        for script in ROOT.glob("*.py"):
            shutil.copyfile(script, Path(folder) / script.name)
        file = Path(folder) / mutant.file
        text = file.read_text()
        if text.count(mutant.right) != 1:
            raise ValueError(
                f"{mutant.name}: {mutant.file} has {text.count(mutant.right)} places like {mutant.right!r}"
            )
        file.write_text(text.replace(mutant.right, mutant.wrong))
        command = f"exec {sys.executable} -m pytest -x -q -p no:cacheprovider {mutant.tests}"
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"{mutant.name}: the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    survivors = []
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(chosen), unit="bug") as bar:
        for mutant, red in zip(chosen, pool.map(caught, chosen), strict=True):
            bar.write(f"{'caught  ' if red else 'SURVIVED'}  {mutant.name}  ({mutant.file})")
            bar.update()
            survivors += [] if red else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted bugs caught")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
