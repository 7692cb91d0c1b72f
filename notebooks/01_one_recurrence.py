# %% [markdown]
# # From softmax attention to one recurrence
#
# Softmax attention keeps the key and the value of every token. How can a memory of fixed size take their place, and
# what do the models that work this way have in common?
#
# You need to know attention and a little PyTorch. The notebook runs on a CPU in a few seconds. Everything is imported
# from `reference/`, the specification of this project; what a cell claims, it asserts.
#
# Letters: `b` batch, `t` time, `h` heads, `k` key size, `v` value size. Vectors are rows, so a query `q` reads a
# memory `M` as `q M`.

# %%
import inspect
import sys
import time

sys.path.extend([".", ".."])  # the repository, where it is not installed

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from reference import chunked, example, recurrence
from reference.attention import attention
from reference.lsm import BETA, LSM, QKV
from reference.mixers.linear_attention import FEATURE_MAP
from reference.model import state_bytes
from reference.recurrence import look
from reference.span import apply, compose, span, transition

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # so that equal means equal, up to the last digits

# %% [markdown]
# ## 1. Softmax attention compares a query with every key
#
# $$o_t = \sum_{j \le t} \frac{\exp(q_t \cdot k_j / \sqrt{K})}{\sum_{i \le t} \exp(q_t \cdot k_i / \sqrt{K})} \; v_j$$
#
# Here is one head, written out: a table of weights with a row for each token. Its size is $T \times T$.

# %%
T, K, V = 96, 16, 8
q, k, v = torch.randn(T, K), torch.randn(T, K), torch.randn(T, V)

scores = (q @ k.mT / K**0.5).exp().tril()  # tril: no token sees a later one
weights = scores / scores.sum(-1, keepdim=True)

assert_close(weights @ v, attention(q[None, :, None], k[None, :, None], v[None, :, None])[0][0, :, 0])
print("weights", tuple(weights.shape))

# %% [markdown]
# ## 2. Replace the exponential by a product of features
#
# The exponential ties the query and the key together, so no part of the sum can be prepared before the query is
# known. Write $\phi(q) \cdot \phi(k)$ in its place, with a function $\phi$ that is positive, here $\mathrm{elu} + 1$.
# This is another model with other weights, not an approximation of the softmax. The table is still $T \times T$.

# %%
phi = FEATURE_MAP["elu"]

scores = (phi(q) @ phi(k).mT).tril()
weights = scores / scores.sum(-1, keepdim=True)
o = weights @ v

assert (weights >= 0).all()
assert_close(weights.sum(-1), torch.ones(T))

# %% [markdown]
# ## 3. Move the brackets
#
# Products of matrices are associative. For token $t$, with $\phi$ already applied,
#
# $$\sum_{j \le t} (q_t \cdot k_j) \, v_j = q_t \Big( \sum_{j \le t} k_j^{\mathsf T} v_j \Big) = q_t M_t.$$
#
# The bracket is a matrix of $K \times V$ numbers, whatever $t$ is, and it does not contain the query. Each token adds
# its outer product $k_t^{\mathsf T} v_t$ to it. The denominator is a sum of the same kind, with 1 in place of $v_j$.

# %%
M, z, rows = torch.zeros(K, V), torch.zeros(K), []
for q_t, k_t, v_t in zip(phi(q), phi(k), v, strict=True):
    M = M + torch.outer(k_t, v_t)
    z = z + k_t
    rows.append(q_t @ M / (q_t @ z))

assert_close(torch.stack(rows), o)
print("memory", tuple(M.shape))

# %% [markdown]
# ## 4. The loop
#
# That loop has three places where one can make another choice: what the memory forgets, what is written, and how it is
# read. With a word for each, every model of this project is
#
# $$M_t = \mathrm{update}(\mathrm{decay}(M_{t-1})), \qquad o_t = \mathrm{read}(M_t).$$
#
# Below is the loop as the project runs it. Update and read are also given the memory `before` the step; RWKV6, for one,
# reads that.

# %%
print(inspect.getsource(recurrence.loop))

row = LSM["linear_attention_normalized"]  # the loop of section 3
tokens = {"q": phi(q)[None, :, None], "k": phi(k)[None, :, None], "v": v[None, :, None]}
assert_close(recurrence.recurrence(row, tokens)[0][0, :, 0], o)

# %% [markdown]
# ## 5. The table
#
# A model is a row: three words and the shapes of its inputs. The last column belongs to section 8.

# %%
print(f"{'model':34}{'decay':10}{'update':10}{'read':12}class of A")
for row in LSM.values():
    print(f"{row.title:34}{row.decay.__name__:10}{row.update.__name__:10}{row.read.__name__:12}{transition(row)}")

words = dict.fromkeys(word for part in zip(*(row[:3] for row in LSM.values()), strict=True) for word in part)
print("\n" + "\n".join(map(inspect.getsource, words)))

# %% [markdown]
# ## 6. Decay makes room
#
# The plain sum never forgets. Keys in $K$ dimensions cannot all be orthogonal once there are more than $K$ of them, so
# what is read is the wanted value plus a little of every other value. A decay shrinks old writes at every step.
#
# The experiment stores 1024 random pairs and reads back the value stored `lag` tokens before the end, with three fixed
# decays, one a head. The error is relative, a mean of 8 runs: 0 is perfect, 1 is what reading nothing would give.

# %%
T, K, V, rates = 1024, 64, 64, [1.0, 0.99, 0.9]
lags, heads = [0, 8, 64, 512], len(rates)
k, v = F.normalize(torch.randn(8, T, 1, K), dim=-1), torch.randn(8, T, 1, V)
tokens = {n: x.expand(-1, -1, heads, -1) for n, x in {"q": k, "k": k, "v": v}.items()}
_, M = recurrence.recurrence(LSM["retention"], tokens, {"g": torch.tensor(rates).log()})

error = torch.stack([(look(M, k[:, -1 - lag].expand(-1, heads, -1)) - v[:, -1 - lag]).norm(dim=-1) for lag in lags])
error = error.mean(1) / v.norm(dim=-1).mean()  # lags, heads
print("decay", *(f"{rate:>8}" for rate in rates))
for lag, line in zip(lags, error, strict=True):
    print(f"lag {lag:<5}", *(f"{x:8.2f}" for x in line))

assert error[0, 2] < error[0, 1] < error[0, 0]  # a stronger decay finds the newest value better ...
assert error[2, 2] > 0.95  # ... and has lost the older ones
assert error[3, 0] > 1  # without decay, all values drown alike

# %% [markdown]
# No constant is best for all lags. Mamba2 and Gated DeltaNet therefore compute a decay from each token (`scalar`), GLA,
# HGRN2, RWKV6 and Kimi Delta Attention one for each key channel as well (`channel`).
#
# ## 7. The delta rule overwrites
#
# Let 16 keys come twice, the second time with a new value. An outer product adds the new value to the old one. The
# delta rule first looks up what the key already finds, and writes only the difference: with $\beta = 1$ and a key of
# length 1, the key finds exactly the new value afterwards. It is a step of gradient descent on
# $\tfrac12 \lVert k M - v \rVert^2$ with step size $\beta$. With orthonormal keys nothing else changes; random keys
# disturb each other under either rule.

# %%
pairs = 16
old, new = torch.randn(2, 1, pairs, 1, V)


def recall(name, k):
    """What the keys find after old and new values have been stored under them."""
    tokens = {"q": torch.cat([k, k], 1), "k": torch.cat([k, k], 1), "v": torch.cat([old, new], 1)}
    tokens["beta"] = torch.ones(1, 2 * pairs, 1)
    _, M = recurrence.recurrence(LSM[name], tokens)
    return torch.stack([look(M, k[:, i]) for i in range(pairs)], 1)


orthonormal = torch.linalg.qr(torch.randn(K, K)).Q[None, :pairs, None]
assert_close(recall("linear_attention", orthonormal), old + new)
assert_close(recall("delta_net", orthonormal), new)

random = F.normalize(torch.randn(1, pairs, 1, K), dim=-1)
error = {name: (recall(name, random) - new).norm() / new.norm() for name in ("linear_attention", "delta_net")}
print("random keys, relative error:", ", ".join(f"{name} {x:.2f}" for name, x in error.items()))
assert error["delta_net"] < error["linear_attention"] / 2

M, key, value = torch.randn(K, V, requires_grad=True), random[0, 0, 0], new[0, 0, 0]
(gradient,) = torch.autograd.grad((key @ M - value).square().sum() / 2, M)
x = {"k": key[None, None], "v": value[None, None], "beta": torch.tensor([[0.3]])}
assert_close(recurrence.delta(M[None, None], M, x)[0, 0], M - 0.3 * gradient)

# %% [markdown]
# ## 8. A span of tokens is one affine map
#
# Every step in the table is affine in the memory: a part that multiplies $M$ and a part that is added. Steps of that
# kind compose, so any span of tokens, one or a million, acts as
#
# $$M \;\mapsto\; A \diamond M + S.$$
#
# $A$ is a number for each head, a number for each key channel, or a matrix, as the table says; neither $A$ nor $S$
# depends on the memory that comes in. Two neighbouring spans are again a span, $(A_2 A_1, \; A_2 \diamond S_1 + S_2)$.
# The cell checks this for every row of the table whose step is affine in its memory; TTT-linear, with a norm inside, is
# the one that is not.


# %%
def draw(row, b=1, t=96, h=2, k=16, v=8):
    """Random inputs of the row: unit keys, log decays below 0, write strengths in (0, 1)."""
    return example.inputs(row, {"b": b, "t": t, "h": h, "k": k, "v": v}, dtype=torch.float32, drawn=example.TRAINED)


affine = [row for row in LSM.values() if transition(row) is not None]
for row in affine:
    tokens, constants = draw(row)
    first, rest = ({n: x[:, part] for n, x in tokens.items()} for part in (slice(0, 37), slice(37, None)))
    start = torch.randn_like(recurrence.empty(row, tokens, constants))
    _, end = recurrence.recurrence(row, tokens, constants, start)

    one, two = span(row, first, constants), span(row, rest, constants)
    assert_close(apply(two, apply(one, start)), end)
    assert_close(apply(compose(two, one), start), end)
print(f"{len(affine)} of {len(LSM)} rows: two spans, one after the other or composed, do what the loop does")

# %% [markdown]
# ## 9. So chunks can be computed in parallel
#
# Cut the sequence into chunks of 64 tokens. What each chunk does to a memory does not depend on any other chunk, so all
# pairs $(A, S)$ are computed at once, in matrix products. A short loop over chunks then gives the memory before each,
# and all outputs follow at once. The sum is the one of the loop in another order: the results agree up to rounding.

# %%
for name in ("linear_attention", "retention", "mamba2", "gla", "rwkv6", "delta_net", "gated_delta_net", "kda", "rwkv7"):
    row = LSM[name]
    tokens, constants = draw(row, t=1024, h=4, k=64, v=64)
    seconds, results = [], []
    for form in (recurrence, chunked):
        begin = time.perf_counter()
        results.append(form.recurrence(row, tokens, constants))
        seconds.append(time.perf_counter() - begin)
    assert_close(*results, atol=1e-3, rtol=1e-3)
    print(f"{name:30} loop {seconds[0] * 1e3:6.0f} ms   chunks {seconds[1] * 1e3:6.0f} ms")

# %% [markdown]
# The same spans serve other floors of the project: a segment for each multiprocessor of a GPU, a part of the sequence
# for each GPU of a group. Only who composes them differs.
#
# ## 10. Decoding needs memory of constant size
#
# For the next token, the recurrence needs the memory after the last one and nothing else of the past. Softmax attention
# needs all keys and values, which grow with the text. The figure compares one layer with 8 heads of size 128; keys and
# values are bfloat16, the memory is float32.

# %%
h, size = 8, 128
row, lengths = LSM["gla"], [2**i for i in range(4, 18)]
tokens, constants = draw(row, t=32, h=h, k=size, v=size)
_, whole = recurrence.recurrence(row, tokens, constants)
M = None
for t in range(32):  # a token at a time, from one memory to the next
    _, M = recurrence.step(row, {n: x[:, t : t + 1] for n, x in tokens.items()}, constants, M)
assert_close(M, whole)

keys = torch.randn(1, 32, h, size).bfloat16()
_, past = attention(keys, keys, keys)
a_token = (state_bytes(past) - past.length.nbytes) // 32  # keys and values of one token
memory = state_bytes(whole.float())
assert (a_token, memory) == (2 * h * size * 2, h * size * size * 4)
print(f"keys and values: {a_token} bytes a token; memory: {memory} bytes; equal at {memory // a_token} tokens")

figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for shared, style in ((8, "-"), (1, "--")):
    kib = [n * a_token * shared / h / 1024 for n in lengths]
    axes.plot(lengths, kib, f"C1{style}", label=f"softmax attention, key heads: {shared}")
axes.plot(lengths, [memory / 1024] * len(lengths), "C0", label="a memory that is a matrix")
axes.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="state of one layer, KiB")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Below 128 tokens the keys and values are smaller than the memory; with one key head that all query heads share, below
# 1024. After that the memory is smaller, and the price is section 6: it cannot hold everything. This is one reason why
# hybrid models keep a few softmax layers.
#
# ## 11. Change this and run again
#
# - Section 6: with `K` 256, at which lags is the decay 0.99 better than reading nothing?
# - Section 7: with `beta` 0.5, what do the orthonormal keys find? (Work it out, then correct the assert.)
# - Section 10: at what length do the curves meet with heads of size 64?
# - Below: Retention's fixed decay with the delta rule. Spans and chunk form come with the three words. Put another
#   combination in its place.

# %%
mine = LSM["retention"]._replace(update=recurrence.delta, tokens=QKV | BETA, title="Retention with the delta rule")
tokens, constants = draw(mine)
assert_close(chunked.recurrence(mine, tokens, constants), recurrence.recurrence(mine, tokens, constants))
print(f"{mine.title}: chunks agree with the loop; a span's A is a {transition(mine)}")
