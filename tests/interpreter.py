"""Triton's interpreter without what it does over and over for nothing: half of its time. Its numbers stay the same.

Versions whose interpreter is built another way run as they are.
"""

import dataclasses

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
