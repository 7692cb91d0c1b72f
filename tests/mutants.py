"""Plants bugs, one at a time in a copy of the repository, and shows that the laws catch each.

    python tests/mutants.py                 all of them (minutes)
    python tests/mutants.py halo rank       those whose name has one of these words

A mutant that no test catches is a hole in the tests: the exit code is the number of survivors. An entry whose text is
no longer in its file is named before any test runs.
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
        "o = o + inside.scores @ written",
        "o = o + 1.003 * inside.scores @ written",
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
        "reference/span.py",
        "lambda A, M: A @ M,",
        "lambda A, M: A.mT @ M,",
        "tests/test_recurrence.py -k 'a_span_is'",
    ),
    Mutant(
        "adjoint not transposed",
        "reference/span.py",
        "lambda A, D: A.mT @ D,",
        "lambda A, D: A @ D,",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "gradient of the transition dropped",
        "reference/span.py",
        "lambda A, D, M: D @ M.mT,",
        "lambda A, D, M: 0 * (D @ M.mT),",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "spans composed in the wrong order",
        "reference/span.py",
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
        "reference/span.py",
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
        "parallel/attention.py",
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
        "attention has the heads of the linear model",
        "reference/mixers/softmax.py",
        "return config.attention_heads or config.heads",
        "return config.heads",
        "tests/test_mixers.py -k 'oracles and KimiLinearAttention'",
    ),
    Mutant(
        "the last letters stand behind every pattern",
        "reference/presets.py",
        "self.spelled(self.pattern) * self.repeat + self.spelled(self.last)",
        "(self.spelled(self.pattern) + self.spelled(self.last)) * self.repeat",
        "tests/test_presets.py -k letters",
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
        "gate = (scores if x.bias is None else scores + x.bias).gather(-1, index)",
        "tests/test_routers.py tests/test_moe.py",
    ),
    Mutant(
        "balance loss counted twice",
        "reference/balance.py",
        "return (counts.detach().to(mass) * mass).sum(-1) * counts.shape[-1] / (k * N.square())",
        "return 2 * (counts.detach().to(mass) * mass).sum(-1) * counts.shape[-1] / (k * N.square())",
        "tests/test_balance.py",
    ),
    Mutant(
        "the bias moves the wrong way",
        "reference/balance.py",
        "return bias + rate *",
        "return bias - rate *",
        "tests/test_balance.py",
    ),
    Mutant(
        "documents compete for room",
        "reference/routers.py",
        "line = (number[:, None] * (experts + 1) + expert).flatten()",
        "line = (0 * number[:, None] + expert).flatten()",
        "tests/test_routers.py tests/test_moe.py",
    ),
    Mutant(
        "empty slots take room",
        "reference/routers.py",
        "expert = index.masked_fill(index < 0, experts)",
        "expert = index.clamp(min=0)",
        "tests/test_routers.py -k empty_slots",
    ),
    Mutant(
        "a rank's balance loss is the whole of it",
        "reference/balance.py",
        "return loss - loss.detach() * (1 - mine.tokens / tokens(total))",
        "return loss",
        "tests/test_balance.py -k ranks_add_up",
    ),
    Mutant(
        "the sequence loss pools documents",
        "reference/routers.py",
        "counts = (document[:, None] * e + index)",
        "counts = (0 * document[:, None] + index)",
        "tests/test_balance.py tests/test_routers.py -k 'sequence or additive'",
    ),
    Mutant(
        "the load of noise forgets its own threshold",
        "reference/routers.py",
        "threshold = torch.where(inside, ranked[:, x.k :], ranked[:, x.k - 1 : x.k])",
        "threshold = ranked[:, x.k - 1 : x.k]",
        "tests/test_routers.py -k chance",
    ),
    Mutant(
        "an auction that stops at its first prices",
        "reference/assignment.py",
        "if step <= least:",
        "if True:",
        "tests/test_routers.py -k shares_tokens_out_best",
    ),
    Mutant(
        "the jitter reaches the experts",
        "reference/moe.py",
        "self.seen(tokens), self.within(routing)",
        "self.seen(self.jittered(tokens, side)), self.within(routing)",
        "tests/test_moe.py -k jitters",
    ),
    Mutant(
        "a latent is left through a nonlinearity",
        "reference/moe.py",
        "y = y if self.up is None else F.linear(y, self.up)\n        if c.identity:",
        "y = y if self.up is None else F.linear(y.relu(), self.up)\n        if c.identity:",
        "tests/test_moe.py -k 'latent or gate_matrix'",
    ),
    Mutant(
        "Llama-4's gate waits for the expert's output",
        "reference/routers.py",
        'post=True, gate_at="input"',
        "post=True",
        "tests/test_blocks.py -k llama_4",
    ),
    Mutant(
        "DeepSeek-V2 forgets its scale",
        "reference/routers.py",
        "group_best=1, scale=16.0",
        "group_best=1",
        "tests/test_blocks.py -k deepseek_v2",
    ),
    Mutant(
        "what is added to one is clamped on one side only",
        "reference/moe.py",
        "gate.clamp(max=7.0), up.clamp(-7.0, 7.0)",
        "gate.clamp(max=7.0), up.clamp(max=7.0)",
        "tests/test_blocks.py -k gpt_oss",
    ),
    Mutant(
        "a token's priority is all that it is given",
        "reference/routers.py",
        "tokens = gate.amax(-1)",
        "tokens = gate.sum(-1)",
        "tests/test_blocks.py -k nllb",
    ),
    Mutant(
        "the most probable are dropped",
        "reference/routers.py",
        "return gate.flatten().sort(descending=True, stable=True).indices",
        "return gate.flatten().sort(stable=True).indices",
        "tests/test_megatron.py -k dropped",
    ),
    Mutant(
        "experts' rows not put back",
        "reference/moe.py",
        "combine(y.index_select(0, order.argsort()), gate)",
        "combine(y.index_select(0, order), gate)",
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
        "reference/noise.py",
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
        "cut: backward folds over the earlier ranks",
        "parallel/lasp.py",
        "fold_back(spans[later:], Gs[later:], torch.zeros_like(S))",
        "fold_back(spans[:me], Gs[:me], torch.zeros_like(S))",
        "tests/test_lasp.py -k equal_one",
    ),
    Mutant(
        "cut: a chain passes on its first document's memory",
        "parallel/lasp.py",
        "last[-len(M) :]",
        "last[: len(M)]",
        "tests/test_sequence.py -k rank_to_rank",
    ),
    Mutant(
        "cut: a late memory decays one token too far under a bonus",
        "reference/late.py",
        "so_far(g) if x.u is None else before(g)",
        "so_far(g)",
        "tests/test_sequence.py -k afterwards",
    ),
    Mutant(
        "cut: a border is forgotten on the wire",
        "reference/span.py",
        "value=float(whole)",
        "value=1.0",
        "tests/test_lasp.py -k equal_one",
    ),
    Mutant(
        "cut: keys go round one rank too few",
        "parallel/attention.py",
        "if place < self.starts[r + 1]",
        "if place < self.starts[r]",
        "tests/test_sequence.py -k 'softmax or round or travels'",
    ),
    Mutant(
        "cut: the softmax's sum is not corrected as better scores come",
        "parallel/attention.py",
        "total = kept * total +",
        "total = total +",
        "tests/test_sequence.py -k softmax",
    ),
    Mutant(
        "cut: gradients of keys stay where they went",
        "parallel/attention.py",
        "received = comm.rotate(received, group, -rounds)",
        "pass",
        "tests/test_sequence.py -k softmax",
    ),
    Mutant(
        "cut: ulysses repeats key heads in the wrong order",
        "parallel/attention.py",
        "x.repeat_interleave(math.lcm(keys, ranks) // keys, 2)",
        "x.repeat(1, 1, math.lcm(keys, ranks) // keys, 1)",
        "tests/test_sequence.py -k softmax",
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
        "parallel/graph.py",
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
        "rows that come back go to the wrong token",
        "parallel/experts.py",
        "return Plan(order[: sum(send)], order.argsort(),",
        "return Plan(order[: sum(send)], order,",
        "tests/test_experts.py -k experts_over_ranks",
    ),
    Mutant(
        "the way back has the splits of the way there",
        "parallel/experts.py",
        "exchange(D, ctx.receive, ctx.send, ctx.group)",
        "exchange(D, ctx.send, ctx.receive, ctx.group)",
        "tests/test_experts.py -k told",
    ),
    Mutant(
        "dropout of shared experts numbered by rank alone",
        "parallel/experts.py",
        "* comm.size(group) + comm.rank(group))",
        ")",
        "tests/test_experts.py -k experts_over_ranks",
    ),
    Mutant(
        "a gate counts twice on its way",
        "parallel/experts.py",
        "gate=routing.gate.new_ones(index.shape)",
        "gate=routing.gate.new_full(index.shape, 2.0)",
        "tests/test_experts.py -k experts_over_ranks",
    ),
    Mutant(
        "the room of one rank for the rows of all",
        "parallel/experts.py",
        "None if room is None else sum(rooms)",
        "room",
        "tests/test_experts.py -k experts_over_ranks",
    ),
    Mutant(
        "replicas count in the norm each",
        "parallel/shard.py",
        "[1 / copies(g) for g in grads]",
        "[1.0 for g in grads]",
        "tests/test_experts.py -k every_mesh",
    ),
    Mutant(
        "ranks that repeat a token each count all of its loss",
        "train.py",
        "(loss / config.mesh.tensor).backward()",
        "loss.backward()",
        "tests/test_tensor.py -k every_mixer",
    ),
    Mutant(
        "every rank has the decays of the first heads",
        "parallel/tensor.py",
        "smaller.first, smaller.all_heads = rank * smaller.heads, module.heads",
        "pass",
        "tests/test_tensor.py -k every_mixer",
    ),
    Mutant(
        "a packed projection is cut as one",
        "parallel/tensor.py",
        "blocks = blocks or [(weight.shape[differing[0]], True)]",
        "blocks = [(weight.shape[differing[0]], True)]",
        "tests/test_tensor.py -k every_mixer",
    ),
    Mutant(
        "a norm over the channels of one rank",
        "parallel/tensor.py",
        "if plan.across(module):",
        "if False:",
        "tests/test_tensor.py -k every_mixer",
    ),
    Mutant(
        "the second bias of experts once a rank",
        "parallel/tensor.py",
        "b2 * (rank == 0)",
        "b2",
        "tests/test_tensor.py -k attention_and_experts",
    ),
    Mutant(
        "the gradient of a sum stays at home",
        "parallel/tensor.py",
        "(_total(D, ctx.group), None)",
        "(D.clone(), None)",
        "tests/test_tensor.py -k every_mixer",
    ),
    Mutant(
        "the loss of the first rank's words",
        "parallel/tensor.py",
        "torch.stack(comm.gather(logits.amax(-1), group)).amax(0)",
        "logits.amax(-1)",
        "tests/test_tensor.py -k over_all",
    ),
    Mutant(
        "the gradient of own tokens is one rank's",
        "parallel/tensor.py",
        "(_scattered(D, ctx.group), None)",
        "(own_tokens(D, comm.named(ctx.group)).clone(), None)",
        "tests/test_tensor.py -k between_the_layers",
    ),
    Mutant(
        "the newest checkpoint pruned",
        "parallel/checkpoint.py",
        "[s for s in newest(folder) if s <= step][:keep]",
        "newest(folder)[:keep]",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "a checkpoint of the state as it will be",
        "parallel/checkpoint.py",
        "values = self.stager.stage(stored(state))",
        "values = stored(state)",
        "tests/test_checkpoint.py -k background",
    ),
    Mutant(
        "a failed save is silent",
        "parallel/checkpoint.py",
        "            pending.result()",
        "            pending.exception()",
        "tests/test_checkpoint.py -k background",
    ),
    Mutant(
        "the end does not wait for the pending checkpoint",
        "parallel/checkpoint.py",
        "        self.wait()\n        if self.thread is None:",
        "        if self.thread is None:",
        "tests/test_checkpoint.py -k background",
    ),
    Mutant(
        "a rank alone knows that it cannot write",
        "parallel/checkpoint.py",
        "        if isinstance(x, OSError):\n            raise x",
        "        if isinstance(x, OSError) and x is said:\n            raise x",
        "tests/test_checkpoint.py -k background",
    ),
    Mutant(
        "any error of the run is a lost rank",
        "parallel/comm.py",
        'isinstance(error, RuntimeError) and re.search(r"gloo/|NCCL", line)',
        "isinstance(error, RuntimeError)",
        "tests/test_killing.py -k network",
    ),
    Mutant(
        "a kernel's read does not decay",
        "fast/kernels/decay.py",
        "seen = seen * reading[:, None]",
        "seen = seen * 1.0",
        "tests/test_fast.py",
    ),
    Mutant(
        "a channel's query fades by the gate of the key it reads",
        "fast/kernels/channel.py",
        "since = (ic > j) if BEFORE else (ic >= j)\n            A = ",
        "since = ic >= j\n            A = ",
        "tests/test_fast.py -k rwkv6",
    ),
    Mutant(
        "a channel's gate has no gradient from the memory at the end",
        "fast/kernels/channel.py",
        "if GATES and REVERSE and ENTRY:",
        "if False:",
        "tests/test_fast.py -k gla",
    ),
    Mutant(
        "a delta rule's chunk is solved in blocks that never meet",
        "fast/kernels/delta.py",
        "Y += Z - tl.dot(Y, strength[:, None] * Z, input_precision=SOLVING)",
        "Y += 0.0 * Z",
        "tests/test_fast.py -k sixteen",
    ),
    Mutant(
        "a delta rule's keys have no gradient from what they erase",
        "fast/kernels/delta.py",
        "tl.store(dk + at_k, strength[:, None] * answered - erased, mask=ok_k)",
        "tl.store(dk + at_k, strength[:, None] * answered, mask=ok_k)",
        "tests/test_fast.py -k delta_net",
    ),
    Mutant(
        "a scan keeps memories at other tokens than its gradient takes them for",
        "fast/kernels/scan.py",
        "due = (i * R % FAR == 0) & (i > 0)",
        "due = i > 0",
        "tests/test_fast.py -k scanned_values",
    ),
    Mutant(
        "a scan leaves memories that it finds again a block too early",
        "fast/kernels/scan.py",
        "slot = near + i * R // KEPT * SIZE + cell",
        "slot = near + (i * R // KEPT + 1) * SIZE + cell",
        "tests/test_fast.py -k far_apart",
    ),
    Mutant(
        "tokens beyond the end turn a spiral",
        "fast/kernels/scan.py",
        "a, b = tl.where(ok, rate, 1.0), tl.where(ok, spin, 0.0)",
        "a, b = rate, spin",
        "tests/test_fast.py -k 'scanned_values and s4'",
    ),
    Mutant(
        "cotangents between segments turn as memories do",
        "fast/kernels/scan.py",
        "times(a, -b if REVERSE else b, M, N, COMPLEX)",
        "times(a, b, M, N, COMPLEX)",
        "tests/test_fast.py -k 'scanned_documents and gate_loop'",
    ),
    Mutant(
        "what a key erases by its square has half its gradient",
        "fast/kernels/scan.py",
        "dk -= 2 * bk * tl.sum",
        "dk -= bk * tl.sum",
        "tests/test_fast.py -k 'scanned_values and longhorn'",
    ),
    Mutant(
        "a chunk of rank one steps is solved in blocks that never meet",
        "fast/kernels/rank_one.py",
        "X -= tl.dot(tl.dot(X, corner, input_precision=SOLVING), X, input_precision=SOLVING)",
        "X -= 0.0 * corner",
        "tests/test_fast.py -k 'sixteen and kda'",
    ),
    Mutant(
        "what erases before the decay is decayed by its own token's gate",
        "fast/kernels/rank_one.py",
        "until = (other < here) if BEFORE else (other <= here)\n    later",
        "until = other <= here\n    later",
        "tests/test_fast.py -k 'rwkv7 and values'",
    ),
    Mutant(
        "a token's own gate has a gradient from what it erases before the decay",
        "fast/kernels/rank_one.py",
        "until = (other > here) if BEFORE else (other >= here)\n                value",
        "until = other >= here\n                value",
        "tests/test_fast.py -k 'comba and values'",
    ),
    Mutant(
        "what is added is not found by later tokens of its chunk",
        "fast/kernels/rank_one.py",
        "tl.store(adding + row * K + at, tl.dot(turned, written, added, input_precision=PRECISION), mask=ok)",
        "tl.store(adding + row * K + at, added, mask=ok)",
        "tests/test_fast.py -k 'rwkv7 and values'",
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
        "2 if (self.negative_eigenvalues if given is None else given) else 1",
        "1",
        "tests/test_learn.py -k parity",
    ),
    Mutant(
        "foresight adds what it should take away",
        "reference/recurrence.py",
        '(x["v"] - look(before, x["a"])))',
        '(x["v"] + look(before, x["a"])))',
        "tests/test_recurrence.py -k 'chunks_equal and comba'",
    ),
    Mutant(
        "what is replaced comes back with its sign turned",
        "reference/normal.py",
        '"a": x["a"], "b": x["b"]}',
        '"a": -x["a"], "b": x["b"]}',
        "tests/test_recurrence.py -k 'chunks_equal and rwkv7'",
    ),
    Mutant(
        "a delta rule's own key is decayed before it looks",
        "reference/chunked.py",
        "exclusive = tril(x.g, exclusive=True) if undecayed else inclusive",
        "exclusive = inclusive",
        "tests/test_recurrence.py -k 'chunks_equal and comba'",
    ),
    Mutant(
        "a bonus reads a memory that has decayed",
        "reference/chunked.py",
        "earlier = prefix(g, exclusive=True).exp() if undecayed and x.g is not None else start",
        "earlier = start",
        "tests/test_recurrence.py -k 'chunks_equal and rwkv6'",
    ),
    Mutant(
        "value channels do not fade from chunk to chunk",
        "reference/chunked.py",
        "total = columns if total is None else total * columns",
        "total = columns if total is None else total",
        "tests/test_recurrence.py -k 'chunks_equal and gated_fast_weights'",
    ),
    Mutant(
        "writes do not fade by value channel",
        "reference/chunked.py",
        "written * inside.fading",
        "written",
        "tests/test_recurrence.py -k 'chunks_equal and gated_fast_weights'",
    ),
    Mutant(
        "reads do not fade by value channel",
        "reference/chunked.py",
        "o = prefix(x.f).exp() * o +",
        "o = o +",
        "tests/test_recurrence.py -k 'chunks_equal and gated_fast_weights'",
    ),
    Mutant(
        "chunks of a delta rule as long as they like",
        "reference/chunked.py",
        "return max(4, power_of_two(keys))",
        "return 4096",
        "tests/test_recurrence.py -k more_tokens_than_keys",
    ),
    Mutant(
        "products of two features count once",
        "reference/recurrence.py",
        " * (1 + (i != j).to(x.dtype)).sqrt()",
        "",
        "tests/test_recurrence.py -k features_are",
    ),
    Mutant(
        "keys among themselves without beta",
        "reference/recurrence.py",
        'write(M, x["beta"][..., None] * x["k"], torch.cat',
        'write(M, x["k"], torch.cat',
        "tests/test_mixers.py -k 'oracles and 2506.05233'",
    ),
    Mutant(
        "the ridge is the identity",
        "reference/recurrence.py",
        'torch.diag_embed(x["ridge"])',
        'torch.diag_embed(torch.ones_like(x["ridge"]))',
        "tests/test_mixers.py -k 'oracles and 2506.05233'",
    ),
    Mutant(
        "full memories move one level too low",
        "reference/recurrence.py",
        ".log2().long().add(1)",
        ".log2().long()",
        "tests/test_mixers.py -k 'oracles and 2506.04761'",
    ),
    Mutant(
        "the inner model's slope forgets its norm",
        "reference/recurrence.py",
        "- normal * along) / deviation",
        ") / deviation",
        "tests/test_recurrence.py -k 'by_hand and ttt_linear'",
    ),
    Mutant(
        "a commit climbs",
        "reference/recurrence.py",
        'weights - x["last"][:, None, None] * learned, weights)',
        'weights + x["last"][:, None, None] * learned, weights)',
        "tests/test_recurrence.py -k 'by_hand and ttt_linear'",
    ),
    Mutant(
        "the adjoint of a rotation turns the same way",
        "reference/span.py",
        "spread(A).conj() * pair(D, -2)",
        "spread(A) * pair(D, -2)",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "the gradient of value channels forgets the keys' decay",
        "reference/span.py",
        "(D * M * row).sum(-2)",
        "(D * M).sum(-2)",
        "tests/test_recurrence.py -k fold_back",
    ),
    Mutant(
        "levels compose in the wrong order",
        "reference/span.py",
        "lambda A, D: levels(A.mT, D),\n        lambda later, earlier: later @ earlier",
        "lambda A, D: levels(A.mT, D),\n        lambda later, earlier: earlier @ later",
        "tests/test_recurrence.py -k associatively",
    ),
    Mutant(
        "a span merges as its last token does",
        "reference/span.py",
        "F.pad(place & -place, (1, 0)).amax(1)",
        "F.pad(place & -place, (1, 0))[:, -1]",
        "tests/test_recurrence.py -k 'a_span_is and log_linear'",
    ),
    Mutant(
        "the angles of a convolution are taken in float32",
        "reference/span.py",
        "within_turn(theta.double() * count)",
        "within_turn(theta * count)",
        "tests/test_recurrence.py -k angles_of_long",
    ),
    Mutant(
        "a span's angles are summed in float32",
        "reference/span.py",
        'x["theta"].double().sum(1)',
        'x["theta"].sum(1)',
        "tests/test_recurrence.py -k angles_of_long",
    ),
    Mutant(
        "keys are turned by their own angle, too",
        "reference/forms.py",
        'angle = x["theta"].double().cumsum(1)',
        'angle = x["theta"].double().cumsum(1) - x["theta"]',
        "tests/test_recurrence.py -k 'chunks_equal and gate_loop'",
    ),
    Mutant(
        "the last memory is not turned back",
        "reference/forms.py",
        "return o, torch.cat([c * real - s * imaginary, s * real + c * imaginary], -2)",
        "return o, N",
        "tests/test_recurrence.py -k 'carries and gate_loop'",
    ),
    Mutant(
        "the chunk form's angles are summed in float32",
        "reference/forms.py",
        'angle = x["theta"].double().cumsum(1)',
        'angle = x["theta"].cumsum(1)',
        "tests/test_recurrence.py -k angles_of_long",
    ),
    Mutant(
        "slots' keys do not fade",
        "reference/forms.py",
        "s, None, f=g)",
        "s, None, f=0 * g)",
        "tests/test_recurrence.py -k 'chunks_equal and gsa'",
    ),
    Mutant(
        "slots' values do not fade",
        "reference/forms.py",
        's, x["v"], None, g=g)',
        's, x["v"], None, g=0 * g)',
        "tests/test_recurrence.py -k 'chunks_equal and gsa'",
    ),
    Mutant(
        "a state space's kernel comes one token late",
        "reference/forms.py",
        "kernel = (read * z[:-1])",
        "kernel = (read * z[1:])",
        "tests/test_recurrence.py -k 'chunks_equal and s4'",
    ),
    Mutant(
        "documents of a convolution are padded with tokens",
        "reference/forms.py",
        "words.level: Form(convolved, still=False)",
        "words.level: Form(convolved)",
        "tests/test_recurrence.py -k 'packed and s4'",
    ),
    Mutant(
        "chunks of a scan begin from the last chunk alone",
        "reference/forms.py",
        "M = act(A, M) + S",
        "M = S",
        "tests/test_recurrence.py -k 'scans_go_on and mamba'",
    ),
    Mutant(
        "a scan has no gradient for the memory it begins with",
        "reference/forms.py",
        "return None, *torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)",
        "return None, None, *torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)[1:]",
        "tests/test_recurrence.py -k 'scans_go_on and mamba'",
    ),
    Mutant(
        "momentum fades after the memory it moves",
        "reference/forms.py",
        "G = fade @ speed",
        "G = speed @ fade",
        "tests/test_recurrence.py -k 'chunks_equal and titans'",
    ),
    Mutant(
        "momentum moves the memory before it is read",
        "reference/forms.py",
        "earlier(moved, 0.0) * k",
        "moved * k",
        "tests/test_recurrence.py -k 'chunks_equal and titans'",
    ),
    Mutant(
        "a mini-batch goes on where it should begin",
        "reference/forms.py",
        'start = memory if x["place"][0, 0] == 0 else start',
        "start = start",
        "tests/test_recurrence.py -k 'chunks_equal and ttt'",
    ),
    Mutant(
        "a text is one mini-batch",
        "reference/mixers/ttt.py",
        "side.positions % self.mini_batch",
        "side.positions",
        "tests/test_mixers.py -k 'oracles and 2407.04620'",
    ),
    Mutant(
        "a commit reaches as far as a first token",
        "reference/mixers/ttt.py",
        "last = self.reach()[-1]",
        "last = self.reach()[0]",
        "tests/test_mixers.py -k 'oracles and 2407.04620'",
    ),
    Mutant(
        "memories share the taps of the first",
        "reference/mixers/mom.py",
        "type(state)(*(part[:, e] for part in state))",
        "type(state)(state[0][:, e], *(part[:, 0] for part in state[1:]))",
        "tests/test_mixers.py -k 'pieces_equal and mom_gated'",
    ),
    Mutant(
        "the weights of the memories do not sum to one",
        "reference/mixers/mom.py",
        'routing = route(router("mixtral"), logits, self.kept)',
        'routing = route(router("qwen2_moe"), logits, self.kept)',
        "tests/test_mixers.py -k 'oracles and 2502.13685'",
    ),
    Mutant(
        "a memory that nobody visits has no gradient",
        "reference/mixers/mom.py",
        "if not len(who):",
        "if False:",
        "tests/test_mixers.py -k nobody_visits",
    ),
    Mutant(
        "values lean towards their own layer's",
        "reference/mixers/rwkv.py",
        "torch.lerp(v, side.values.to(v.dtype),",
        "torch.lerp(v, v,",
        "tests/test_model.py -k hands_its_values",
    ),
    Mutant(
        "later layers hand on their own values",
        "reference/mixers/rwkv.py",
        "self.nu(x).sigmoid()), side",
        "self.nu(x).sigmoid()), side._replace(values=v)",
        "tests/test_model.py -k hands_its_values",
    ),
    Mutant(
        "value heads take turns with the key heads",
        "reference/mixers/delta.py",
        "b t h k -> b t (h r) k",
        "b t h k -> b t (r h) k",
        "tests/test_mixers.py -k heads_that_share",
    ),
    Mutant(
        "a token that is written late has not faded",
        "reference/mixers/mamba3.py",
        "weight = g.exp()[..., None] * (late_now + then[..., None])",
        "weight = late_now + then[..., None]",
        "tests/test_mixers.py -k 'oracles and 2603.15569'",
    ),
    Mutant(
        "keys turn from zero in every piece",
        "reference/mixers/mamba3.py",
        "state and state.angle, side.cu_seqlens",
        "None, side.cu_seqlens",
        "tests/test_mixers.py -k 'pieces and mamba3'",
    ),
    Mutant(
        "a running sum passes the borders of documents between ranks",
        "parallel/lasp.py",
        "float(whole)",
        "1.0",
        "tests/test_lasp.py -k 'ranks_equal_one and running_sum'",
    ),
    Mutant(
        "every step of a product decays",
        "reference/mixers/delta.py",
        'F.pad(tokens["g"][:, :, None], (0, 0, 0, more)).flatten(1, 2)',
        'tokens["g"].repeat_interleave(self.steps, 1)',
        "tests/test_mixers.py -k 'oracles and 2502.10297'",
    ),
    Mutant(
        "a token is read before its last step",
        "reference/mixers/delta.py",
        "o[:, more :: self.steps]",
        "o[:, more - 1 :: self.steps]",
        "tests/test_mixers.py -k 'oracles and 2502.10297'",
    ),
    Mutant(
        "a gate with a floor opens where it should close",
        "reference/mixers/parts.py",
        "floor * torch.sigmoid(rate * u)",
        "floor * torch.sigmoid(-rate * u)",
        "tests/test_mixers.py -k 'oracles and Glm5'",
    ),
    Mutant(
        "the key that latent heads share does not turn",
        "reference/mixers/softmax.py",
        "shared = self.turned(shared[:, :, None], side)[:, :, 0]",
        "pass",
        "tests/test_mixers.py -k 'oracles and Deepseek'",
    ),
    Mutant(
        "a mixture's queries stand slot by slot, not key head by key head",
        "reference/mixers/softmax.py",
        "(b t) k (g h) -> b t (g k h)",
        "(b t) k (g h) -> b t (k g h)",
        "tests/test_mixers.py -k 'oracles and JetMoe'",
    ),
    Mutant(
        "experts side by side with a mixer see what it did",
        "reference/model.py",
        "y, *own = inner(seen, side)",
        "y, *own = inner(seen + sum(outputs), side)",
        "tests/test_model.py -k side_by_side",
    ),
    Mutant(
        "routers inside mixers are balanced for the experts' k",
        "train.py",
        "inside, ops, k)[0]",
        "inside, ops, config.model.top_k)[0]",
        "tests/test_train.py -k inside_mixers",
    ),
    Mutant(
        "a printed rule goes down",
        "reference/printed.py",
        '(look(before, x["k"]) - x["v"]))',
        '(x["v"] - look(before, x["k"])))',
        "tests/test_recurrence.py -k 'chunks_equal and ttt_printed'",
    ),
]


def out_of_date(mutant: Mutant) -> str | None:
    """What is wrong with the entry, if the text to break is not there, once and no more."""
    places = (ROOT / mutant.file).read_text().count(mutant.right)
    return None if places == 1 else f"{mutant.name}: {mutant.file} has {places} places like {mutant.right!r}"


def caught(mutant: Mutant) -> bool:
    """Whether a test turns red."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
            copy(ROOT / part, Path(folder) / part)
        for script in ROOT.glob("*.py"):
            shutil.copyfile(script, Path(folder) / script.name)
        file = Path(folder) / mutant.file
        file.write_text(file.read_text().replace(mutant.right, mutant.wrong))
        command = f"exec {sys.executable} -m pytest -x -q -p no:cacheprovider {mutant.tests}"
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"{mutant.name}: the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if stale := [line for line in map(out_of_date, chosen) if line]:
        print(*stale, sep="\n", file=sys.stderr)
        return len(stale)
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
