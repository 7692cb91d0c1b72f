"""From a model to a sharded model: parameters cut over ranks, activations recomputed, gradients summed.

A loss that is a sum over my tokens divided by the number of everybody's has gradients that must be *summed* over ranks;
so no factor of any group's size is anywhere.
"""

import math
import warnings
from collections.abc import Collection, Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from parallel import comm, experts, tensor
from parallel.comm import Group
from parallel.graph import recomputed
from parallel.mesh import Mesh
from parallel.window import Windows
from reference.moe import MoE


def checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Keep only each block's inputs and what it found `once`, and run it again in the backward pass; before `shard`.

    In place, and no parameter changes its name. A block must be a function of its inputs alone: the generator's state
    is not restored (dropout here is a function of the token's number). What a block communicates, it does twice, but
    for what is found once.
    """
    for block in blocks:
        block.forward = partial(recomputed, block.forward)


Apart = dict[nn.Module, set[nn.Parameter]]  # layers, and their parameters of which ranks hold different parts


def shard(
    model: nn.Module,
    mesh: Mesh,
    blocks: Collection[nn.Module],
    narrow: torch.dtype | None = None,
    times: int = 1,
    windows: Windows | None = None,
) -> None:
    """FSDP2, in place: each block, then the rest of the model. One process: nothing.

    Parameters are cut over all ranks of a replica and are the same in every replica. Those of experts, where these are
    shared out, are cut over the ranks that hold the same experts, and parts of layers, where ranks share heads, over
    those that hold the same part. With `narrow`, experts, which are most of the parameters, travel and compute in that
    dtype, and their gradients are summed in float32; not where ranks share heads and cut experts where they are used.
    `times` is how many backward passes come before gradients are summed over ranks. Where ranks read each other's
    memory all that travels does so by `windows`.
    Raises ValueError, one line, if experts or heads cannot be shared out.
    """
    cut(model, mesh, blocks, share_out(model, mesh), narrow, times, windows)


def share_out(model: nn.Module, mesh: Mesh) -> Apart:
    """Experts and heads of a whole model to their ranks, in place, before `cut`; what they hold of them."""
    if mesh.shards is None:
        return {}
    experts.place(model, mesh.experts)
    return tensor.place(model, mesh.tensors, mesh.between == "cut", mesh.experts is not None)


def cut(
    model: nn.Module,
    mesh: Mesh,
    blocks: Collection[nn.Module],
    apart: Apart,
    narrow: torch.dtype | None = None,
    times: int = 1,
    windows: Windows | None = None,
) -> None:
    """`shard`, of a model (or some blocks of one) whose experts and heads are shared out."""
    if mesh.shards is None:
        return
    windows = windows or windows_of(mesh)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    narrow = narrow if mesh.tensors is None or mesh.experts is not None else None
    apart = {layer: apart[layer] for layer in model.modules() if layer in apart}
    if mesh.experts is not None or narrow:
        apart |= {layer: set(layer.own().values()) for layer in layers}
    own = set().union(*apart.values())
    # It warns of outputs that are views, which must not be changed in place. Nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    groups = grouped(model, blocks, apart)
    places = {part: (i, place) for i, group in enumerate(groups) for place, part in enumerate(group)}
    for part in (*blocks, model):
        again = mesh.reshard and part is not model  # the model's own are the last that are used, and the first back
        part = fully_shard(part, mesh=mesh.shards, reshard_after_forward=again, ignored_params=own)
        summed(part, mesh.shards, windows, *places[part])
    # Torch begins with the innermost module, whose parameters are then all its own. Here a layer's are those that are
    # on another mesh or in another dtype than what stands beside them, so layers come last.
    for layer, mine in apart.items():
        others, narrower = set(layer.parameters()) - mine, narrow if layer in layers else None
        where = over_whom(layer, mesh)
        # What torch adds up (over ranks, or over backward passes before) it adds up in the dtype in which it travels.
        wide = narrower and (times > 1 or not by_windows(where["mesh"], windows))
        policy = MixedPrecisionPolicy(narrower, torch.float32 if wide else None, cast_forward_inputs=False)
        how = {"mp_policy": policy, "reshard_after_forward": mesh.reshard}
        summed(fully_shard(layer, **where, **how, ignored_params=others), where["mesh"], windows, *places[layer])
    gather_ahead(groups)


def grouped(model: nn.Module, blocks: Collection[nn.Module], apart: Apart) -> list[list[nn.Module]]:
    """The model, then each block, in the order of use; behind each the layers apart in it (of the model: in no
    block)."""
    groups = [[block, *(layer for layer in block.modules() if layer in apart)] for block in blocks]
    inside = set().union(*groups)
    return [[model, *(layer for layer in apart if layer not in inside)], *groups]


def gather_ahead(groups: list[list[FSDPModule]]) -> None:
    """From a block's beginning on all parameters of the next one are gathered; on the way back those of the block
    before. Torch alone asks for parameters where they are used first: as long before they are needed as the host is
    ahead, and on the way back, with blocks that run again, at the last moment."""
    for here, later in pairwise(groups):
        here[0].set_modules_to_forward_prefetch(later)
    for earlier, here in pairwise(groups[1:]):
        here[0].set_modules_to_backward_prefetch(earlier)


def group_of(mesh: DeviceMesh) -> Group:
    """Over whom parameters are cut: the last dimension, behind that of replicas."""
    return mesh.get_group(mesh.ndim - 1)


def windows_of(mesh: Mesh) -> Windows | None:
    """New ones, if the mesh is to have some."""
    return Windows() if mesh.windows else None


def by_windows(mesh: DeviceMesh, windows: Windows | None) -> bool:
    """Whether what is cut over a mesh travels by windows."""
    return windows is not None and windows.on(group_of(mesh))


def summed(part: FSDPModule, mesh: DeviceMesh, windows: Windows | None, block: int, place: int) -> None:
    """Gradients are summed over ranks, with no factor. What travels lies in windows, or in buffers of the group's own
    kind, if it has one: NCCL reads and writes these without copies."""
    group = group_of(mesh)
    if by_windows(mesh, windows):
        gather, sum_ = windows.part(group, block, place)
        part.set_custom_all_gather(gather)
        part.set_custom_reduce_scatter(sum_)
    elif comm.size(group) > 1:
        part.set_allocate_memory_from_process_group_for_comm(True)
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor in it


def over_whom(layer: nn.Module, mesh: Mesh) -> dict:
    """Where a layer's experts, or its part, are cut, for `fully_shard`: over the ranks that hold the same ones."""
    grid, placement = mesh.tensors, tensor.placement
    if isinstance(layer, MoE) and (mesh.experts is not None or grid is None):
        grid, placement = mesh.experts, experts.placement
    if grid is None:
        return {"mesh": mesh.shards}
    alike = grid.mesh_dim_names[-2]  # the last name is that of the ranks with the others
    own = grid[alike]
    where = grid["replicas", alike] if mesh.replicas > 1 else own
    return {"mesh": where, "shard_placement_fn": lambda weight: placement(weight, own.size())}


def synchronize(model: nn.Module, last: bool) -> None:
    """Whether the coming backward pass ends in the sum over ranks: that of a step's last micro-batch does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def held(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Numbers of parameters by part, experts and all else: those on this rank, and all there are."""
    own = {p for layer in model.modules() if isinstance(layer, MoE) for p in layer.own().values()}
    parts = {"experts": own, "everything else": set(model.parameters()) - own}
    return {name: (sum(local(p).numel() for p in ps), sum(p.numel() for p in ps)) for name, ps in parts.items()}


def copies(x: Tensor) -> int:
    """Ranks that hold the same numbers of x."""
    if not isinstance(x, DTensor):
        return 1
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    return math.prod(n for placement, n in sizes if isinstance(placement, Replicate))


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor], apart: bool = False) -> Tensor:
    """The 2-norm of all gradients, over all ranks, the same number everywhere. One that is not finite makes it so.
    `apart` says that ranks hold different parameters, even if whole ones.

    One exchange, of the sum of squares, whatever meshes the parameters are on: what several ranks hold alike counts
    on each of them its part.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    alike: dict[int, list[Tensor]] = {}
    for g in grads:
        alike.setdefault(copies(g), []).append(local(g))
    mine = sum(torch.stack(torch._foreach_norm(own)).double().square().sum() / n for n, own in alike.items())
    group = comm.world() if apart or any(isinstance(g, DTensor) for g in grads) else None
    return comm.total(mine, group).sqrt().to(grads[0].dtype)


def move(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> None:
    """The optimizer's step with gradients, whose norm is `norm`, scaled so that it is at most `limit`; none, so that
    nothing of its state moves either, if it is not finite.

    Torch's fused steps do both on the device, as they must for loss scaling, so that the host need not wait for the
    norm. (It has none of SGD for parameters that are cut.)
    """
    shrink = ((norm + 1e-6) / limit).clamp(min=1.0).float()
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = shrink, 1.0 - norm.isfinite().float()
        optimizer.step()
    elif norm.isfinite():
        grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, shrink)
        optimizer.step()
