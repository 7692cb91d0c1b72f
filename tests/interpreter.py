"""Triton's interpreter without what it does over and over for nothing: half of its time. Its numbers stay the same.

Versions whose interpreter is built another way run as they are. And, where a law asks for it, with the sums of a GPU.
"""

import dataclasses

import numpy as np
from triton.runtime import interpreter


def hurry() -> None:
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_a_launch(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    if not builder.options.debug and hasattr(builder.options, "sanitize_overflow"):
        # Whether an integer overflows is worked out for an assertion that only `debug` makes.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def once_a_launch(patch):
    """The words of `triton.language` are replaced as a launch begins and put back as it ends. Every call of a device
    function in between would look for all of them again, and find them replaced."""
    replaced = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in replaced:
            return interpreter._LangPatchScope()
        launch = not replaced
        replaced.add(module)
        scope = patch(function)
        if launch:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    return patch_once


def add_as_a_gpu_does(monkeypatch) -> None:
    """Products of float32 as a GPU makes them without tensor cores: each number is one chain of multiply-adds, and a
    sum with a product that began at 0 is compiled to the chain that begins at the other summand."""
    builder = interpreter.InterpreterBuilder
    product, plus = builder.create_dot, builder.create_fadd

    def create_dot(self, a, b, begin, *how):
        if a.data.dtype != np.float32:
            return product(self, a, b, begin, *how)
        made = interpreter.TensorHandle(chain(a.data, b.data, begin.data), begin.dtype.scalar)
        made.factors = None if begin.data.any() else (a.data, b.data)
        return made

    def create_fadd(self, x, y):
        for one, other in ((x, y), (y, x)):
            if getattr(one, "factors", None) is not None:
                return interpreter.TensorHandle(chain(*one.factors, other.data), x.dtype.scalar)
        return plus(self, x, y)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "create_fadd", create_fadd)


def chain(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b, one term after the other, each rounded to float32."""
    for column, row in zip(a.T.astype(np.float64), b.astype(np.float64), strict=True):
        total = (column[:, None] * row + total).astype(np.float32)
    return total
