"""Compile what a forward and backward pass would launch, as a whole, of delta rules, by channel, rank one, slots,
element or features, and of a loss and of routers, for a Hopper GPU without one.

    python tests/hopper.py 128 128 bfloat16                    by channel and by rank one
    python tests/hopper.py 128 128 bfloat16 whole              decays as a whole
    python tests/hopper.py 128 128 bfloat16 delta              delta rules with one: keys erase, or a vector of its own
    python tests/hopper.py 128 128 bfloat16 slots              gated slot attention with 64 of them
    python tests/hopper.py 128 128 bfloat16 crossed turning    by row and by column, and by row as it turns
    python tests/hopper.py 16 2048 bfloat16 rate spiral        kinds of scans
    python tests/hopper.py 16 64 bfloat16 features             polynomials of queries and keys
    python tests/hopper.py 16 64 bfloat16 words                the loss over 151,936 words
    python tests/hopper.py 16 64 bfloat16 routers              the choice of 8 of 64 experts, and the order of pairs

Each line: the kernel, its shared memory, and the registers and bytes of stack of a thread (a stack means spills).

A product that still reads a buffer when the next tile is copied into it is an error. What else this cannot show:
whether the machine code is right. Not with TRITON_INTERPRET=1.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget

from fast.kernels import channel, cross, decay, delta, features, head, rank_one, routers, scan
from fast.kernels import slots as slotted
from fast.operators import even

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
SHARED = 232448  # bytes of shared memory that a program may have


def compiled(kernel, programs, *args, **meta):
    """In place of `decay.launch`: tensors may lie anywhere, and are never read."""
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in meta}
    names, signature, constants, attributes = kernel.arg_names, {}, {}, {}
    unseen = {parameter.num for parameter in kernel.params if parameter.do_not_specialize}
    for i, (name, x) in enumerate(zip(names, args, strict=False)):
        other = {type(None): "constexpr", float: "fp32"}
        signature[name] = TYPES[x.dtype] if isinstance(x, torch.Tensor) else other.get(type(x), "i32")
        if x is None:
            constants[(i,)] = None
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0 and i not in unseen):
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in meta.items():
        signature[name], constants[(names.index(name),)] = "constexpr", value
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if done.metadata.shared > SHARED:
        raise MemoryError(f"{kernel.__name__} needs {done.metadata.shared} bytes of shared memory, there are {SHARED}")
    if overwritten := read_while_filled(done.asm["ttgir"]):
        raise RuntimeError(f"{kernel.__name__}: {', '.join(overwritten)} filled anew while a product may still read it")
    print(kernel.__name__, f"{done.metadata.shared} bytes of shared memory, {thread(done.asm['cubin'])}", flush=True)


def read_while_filled(code: str) -> set[str]:
    """Buffers of one tile, filled turn by turn, that a product reads which nobody waits for within its turn."""
    name = r"(%[\w]+)"
    tiles = dict(re.findall(rf"{name} = ttg\.local_alloc(?: : \(\))? -> !ttg\.memdesc<(\d+)x\d+x\d+x", code))
    views = dict(re.findall(rf"{name} = ttg\.memdesc_\w+ {name}", code))
    waits = " ".join(re.findall(r"warp_group_dot_wait ([^{]*)", code))
    found = set()
    for product, *operands in re.findall(rf"{name} = ttng\.warp_group_dot {name}, {name},", code):
        for operand in operands if not re.search(rf"{re.escape(product)}\b", waits) else ():
            while operand in views:
                operand = views[operand]
            if tiles.get(operand) == "1":
                found.add(operand.lstrip("%"))
    return found


def thread(code: bytes) -> str:
    """What a thread needs, as the disassembler that comes with Triton says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return f"{registers} registers, {stack} bytes of stack"


def main(K: str = "64", V: str = "64", dtype: str = "bfloat16", *kinds: str) -> None:
    decay.launch = head.launch = routers.launch = compiled
    decay.multiprocessors = lambda _: 132
    b, t, h, K, V = 1, 600, 2, int(K), int(V)
    q, k, v = (torch.empty(b, t, h, n, dtype=getattr(torch, dtype)) for n in (K, K, V))
    for kind in kinds:
        if kind == "whole":
            whole(q, k, v)
        elif kind == "delta":
            deltas(q, k, v)
        elif kind == "slots":
            slots(q, k, v)
        elif kind == "features":
            products(q, k, v)
        elif kind in ("crossed", "turning"):
            gated(kind, q, k, v)
        elif kind == "words":
            losses(q.dtype)
        elif kind == "routers":
            chosen()
        else:
            scans(getattr(scan, kind.upper()).value, q, k, v)
    if not kinds:
        channels(q, k, v)


def chosen() -> None:
    index = routers.top(torch.empty(4096, 64), 8)
    routers.by_expert(index, torch.empty(index.shape, dtype=torch.bool), 64)


def scans(kind: int, q, k, v) -> None:
    b, t, h, K = q.shape
    V, size = v.shape[-1], scan.memories(kind) * K
    rows = K if kind == scan.PACE.value else None
    fixed = {scan.RATE.value: (1,), scan.PACE.value: (1,), scan.FULL.value: (b, t), scan.SPIRAL.value: (4,)}.get(kind)
    q, k = (None, None) if kind == scan.SPIRAL.value else (q, k)
    rows = None if rows is None else torch.empty(b, t, h, rows)
    columns = torch.empty(b, t, h, V) if kind < scan.PACE.value else None
    fixed = None if fixed is None else torch.empty(*fixed, h, K, V)
    memory = torch.empty(1, h, size, V)
    given = (kind, q, k, v, rows, columns, fixed, memory, torch.tensor([0, t], dtype=torch.int32))
    _, *kept = scan.forward(*given, 2, True)
    scan.backward(v, memory, *given, *kept)


def channels(q, k, v) -> None:
    b, t, h, K = q.shape
    V = v.shape[-1]
    g, u, memory = torch.empty(b, t, h, K), torch.empty(h, K), torch.empty(1, h, K, V)
    borders = torch.tensor([0, t], dtype=torch.int32)
    _, _, *kept = channel.forward(q, k, v, g, u, memory, borders, 2, False, True)
    channel.backward(v, memory, q, k, v, u, borders, *kept, 2, True, True)
    scores, asked, _, _, _, met = kept
    channel.outputs(asked, v, scores, met, borders)
    channel.step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], u, memory)
    beta = torch.empty(b, t, h)
    for given in ((beta, g, None, None), (beta, beta, q, None), (None, g, q, q)):  # as in KDA, wide Comba, RWKV7
        _, _, news, states, moves, *found = rank_one.forward(q, k, v, *given, memory, borders, 2, False, True)
        rank_one.backward(v, memory, q, k, v, *given, borders, news, states, moves, found, True)
        rank_one.step(*(None if x is None else x[:, 0] for x in (q, k, v, *given)), memory)


def gated(kind: str, q, k, v) -> None:
    n, g, f = q.shape[2], torch.empty(q.shape), torch.empty(v.shape)
    f, theta = (f, None) if kind == "crossed" else (None, g)
    memory = torch.empty(1, n, cross.memory_rows(k, theta), v.shape[-1])
    borders = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    _, _, states, *kept = cross.forward(q, k, v, g, f, theta, memory, borders, 2, True)
    cross.backward(v, memory, q, k, v, memory, borders, states, *kept)
    cross.step(*(x if x is None else x[:, 0] for x in (q, k, v, g, f, theta)), memory)


def slots(q, k, v) -> None:
    """64 slots, the last 14 of which only fill tiles."""
    b, t, h, K = q.shape
    V, M = v.shape[-1], 64
    g, borders = torch.empty(b, t, h, M), torch.tensor([0, t], dtype=torch.int32)
    keys, values = torch.empty(1, h, M, K), torch.empty(1, h, M, V)
    _, _, _, *kept = slotted.forward(q, k, v, g, keys, values, borders, 50, True)
    slotted.backward(v, keys, values, q, k, v, g, borders, *kept)
    slotted.step(*(x[:, 0] for x in (q, k, v, g)), torch.empty(1, h, M, K + V))


def whole(q, k, v) -> None:
    """Memories that fade as a whole, with a gate a token and without."""
    b, t, h, K = q.shape
    V = v.shape[-1]
    beta, memory, borders = torch.empty(b, t, h), torch.empty(1, h, K, V), torch.tensor([0, t], dtype=torch.int32)
    for g in (None, torch.empty(h), beta):
        given = (q, k, v, g, memory, borders)
        _, last, states = decay.forward(*given, 2, False)
        decay.backward(v, memory, *given, last, states, g is not None)
        decay.step(q[:, 0], k[:, 0], v[:, 0], g if g is None or g.ndim == 1 else g[:, 0], memory)
    count = torch.empty(1, h, K)
    given = (q, k, v, memory, count, borders)
    o, _, _, *kept = decay.ratio(*given, 2, 1e-10)
    decay.ratio_gradients(v, memory, count, *given, o, *kept, 1e-10)


def deltas(q, k, v) -> None:
    b, t, h, K = q.shape
    beta, memory, borders = torch.empty(b, t, h), torch.empty(1, h, K, v.shape[-1]), torch.tensor([0, t]).int()
    for a in (None, q) if K <= delta.FOLDED else (None,):
        given = (q, k, v, beta, beta, a, memory, borders)
        _, _, *kept = delta.forward(*given, 2, False, True)
        delta.backward(v, memory, *given, *kept, True)
        delta.step(*(x if x is None else x[:, 0] for x in (q, k, v, beta, beta, a)), memory)


def products(q, k, v) -> None:
    size, borders = q.shape[-1], torch.tensor([0, q.shape[1]], dtype=torch.int32)
    q, k, v = (even(x) for x in (q, k, v))
    # the other sweeps of squares are a part of those of Taylor's features, which need more registers
    for kind, segments in ((features.SQUARES, 1), (features.TAYLOR, 1), (features.TAYLOR, 2)):
        memory = torch.empty(1, q.shape[2], features.features(size, kind), v.shape[-1])
        given = (q, k, v, memory, borders)
        _, _, states = features.forward(*given, size, kind, segments, True)
        features.backward(v, memory, *given, states, size, kind)
    o = features.quotient(v.float(), v.shape[-1] - 2, 1e-5, v.dtype)
    features.quotient_gradients(o, v.float(), 1e-5)


def losses(dtype) -> None:
    logits = torch.empty(1200, 151936, dtype=dtype, device="meta")
    labels, sums = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    head.sums(logits, labels, logits.shape[1])
    head.cotangents(logits, labels, sums, sums, sums, 0, logits.shape[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
