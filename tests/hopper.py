"""Compile what a forward and backward pass would launch, by channel and by rank one, for a Hopper GPU, without one.

    python tests/hopper.py 128 128 bfloat16

What this cannot show: whether the machine code is right. Not with TRITON_INTERPRET=1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget

from fast.kernels import channel, decay, rank_one

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


def compiled(kernel, programs, *args, **meta):
    """In place of `decay.launch`: tensors may lie anywhere, and are never read."""
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages") if name in meta}
    names, signature, constants, attributes = kernel.arg_names, {}, {}, {}
    for i, (name, x) in enumerate(zip(names, args, strict=False)):
        signature[name] = TYPES[x.dtype] if isinstance(x, torch.Tensor) else "constexpr" if x is None else "i32"
        if x is None:
            constants[(i,)] = None
        if isinstance(x, torch.Tensor):
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in meta.items():
        signature[name], constants[(names.index(name),)] = "constexpr", value
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, f"{done.metadata.shared} bytes of shared memory", flush=True)


def main(K: str = "64", V: str = "64", dtype: str = "bfloat16") -> None:
    decay.launch, decay.multiprocessors = compiled, lambda _: 132
    b, t, h, K, V = 1, 600, 2, int(K), int(V)
    q, k, v = (torch.empty(b, t, h, n, dtype=getattr(torch, dtype)) for n in (K, K, V))
    g, u, memory = torch.empty(b, t, h, K), torch.empty(h, K), torch.empty(1, h, K, V)
    given = (q, k, v, g, u, memory, torch.tensor([0, t], dtype=torch.int32))
    _, *kept = channel.forward(*given, 2, False, True)
    channel.backward(v, memory, *given, *kept, True, True)
    channel.step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], u, memory)
    beta = torch.empty(b, t, h)
    for given in ((beta, g, None, None), (beta, beta, q, None), (None, g, q, q)):  # as in KDA, Comba, RWKV7
        borders = torch.tensor([0, t], dtype=torch.int32)
        _, _, news, states, *found = rank_one.forward(q, k, v, *given, memory, borders, False, True)
        rank_one.backward(v, memory, q, k, v, *given, borders, news, states, found, True)
        rank_one.step(*(None if x is None else x[:, 0] for x in (q, k, v, *given)), memory)


if __name__ == "__main__":
    main(*sys.argv[1:])
