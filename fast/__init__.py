"""The reference's functions on Triton kernels, by the same names. Needs a CUDA GPU (Hopper is what it is tuned for).

Experts are torch's own grouped product, in bfloat16.
"""

from fast.ops import ops

__all__ = ["ops"]
