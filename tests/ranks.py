"""What the trainer builds, on ranks that a test has started."""

import functools

from torch.distributed.tensor import DTensor

import train as trainer
from inputs import HERE
from parallel import mesh
from reference.objective import objective
from reference.ops import ops


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone().cpu()


@functools.cache
def made_once(degrees: mesh.Degrees) -> mesh.Mesh:
    """Of this process: a mesh takes as long as a step."""
    return mesh.make(degrees, HERE)


def prepared(config: trainer.Train):
    """As the trainer does it: (place, model, ops, optimizer)."""
    place = made_once(config.mesh)
    over = mesh.over(objective(config.objective).ops(ops), place)
    trainer.refuse_to_cut(config, place)
    model, matrices = trainer.model_of(config, over, place, HERE)
    return place, model, over, trainer.optimizer_of(config, model, matrices)
