"""The Triton backend behind the seam of `reference.ops`: what has a kernel is replaced, the rest is kept by name."""

import reference
from fast import recurrence

ops = reference.ops._replace(
    name="fast",
    recurrence=recurrence.recurrence,
    span=recurrence.span,
    step=recurrence.step,
    kept=(
        "short_convolution",
        "token_shift",
        "running_sum",
        "attention",
        "experts",
        "norm",
        "token_losses",
        "total",
    ),
)
