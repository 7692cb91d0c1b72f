"""The Triton backend behind the seam of `reference.ops`: what has a kernel is replaced, the rest is kept by name."""

import reference
from fast import local, recurrence

ops = reference.ops._replace(
    name="fast",
    recurrence=recurrence.recurrence,
    span=recurrence.span,
    step=recurrence.step,
    short_convolution=local.short_convolution,
    token_shift=local.token_shift,
    norm=local.norm,
    kept=("running_sum", "attention", "experts", "token_losses", "total"),
)
