"""Linear-MoE in plain PyTorch: the specification, on any device, in float64 if asked."""

from reference.ops import Ops, exact, ops

__all__ = ["Ops", "exact", "ops"]
