"""From a model to a sharded model: parameters cut over all ranks, activations recomputed, gradients summed.

A loss that is a sum over my tokens divided by the number of everybody's has gradients that must be *summed* over ranks;
so no factor of any group's size is anywhere.
"""

import warnings
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from parallel.mesh import Mesh


def checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's inputs, and run it again in the backward pass; before `shard`.

    In place, and no parameter changes its name. A block must be a function of its inputs alone: the generator's state
    is not restored (dropout here is a function of the token's number). What a block communicates, it does twice.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard(
    model: nn.Module,
    mesh: Mesh,
    blocks: Iterable[nn.Module],
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """FSDP2, in place, over all ranks of the mesh: each block, then the rest of the model. One process: nothing.

    Parameters travel and compute in `param_dtype`, gradients are summed in `reduce_dtype` (None: as they are).
    """
    if mesh.shards is None:
        return
    # It warns of outputs that are views, which must not be changed in place. Nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh.shards, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor in it


def synchronize(model: nn.Module, last: bool) -> None:
    """Whether the coming backward pass ends in the sum over ranks: that of a step's last micro-batch does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients, over all ranks, the same number everywhere. One that is not finite makes it so."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients, in place, so that their norm, now `norm`, is at most `limit`."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
