"""The layers around the rows, as their papers publish them: projections, convolutions, gates, norms.

A mixer is a module `mixer(x, side, state) -> (y, state)` with x, y : b t d. Its state is a named tuple of tensors
whose size does not depend on how many tokens went by; None stands for the start of a text. A mixer that has something
to hand to later layers, or that routes, returns two things more: the `side` that later layers get, and a list of what
its routers did. The table of rows names the mixer of each
model as "file:Class".
"""

from importlib import import_module

from reference.lsm import row


def kind(lsm: str) -> type:
    """The mixer class of that model."""
    file, name = row(lsm).mixer.split(":")
    return getattr(import_module(f"reference.mixers.{file}"), name)


def build(config, layer: int, layers: int, ops):
    """The mixer of `config.lsm` as number `layer` of `layers`."""
    return kind(config.lsm)(config, layer, layers, ops)
