"""The Triton backend behind the seam of `reference.ops`: what has a kernel is replaced, the rest is kept by name.

Where a function itself hands some dtypes, sizes or devices on to the reference, its docstring says which.
"""

import reference
from fast import experts, head, local, recurrence, routers

ops = reference.ops._replace(
    name="fast",
    recurrence=recurrence.recurrence,
    span=recurrence.span,
    step=recurrence.step,
    short_convolution=local.short_convolution,
    token_shift=local.token_shift,
    top=routers.top,
    by_expert=routers.by_expert,
    experts=experts.experts,
    taken=experts.taken,
    combined=experts.combined,
    linears=experts.linears,
    norm=local.norm,
    unit=local.unit,
    elu_plus_one=local.elu_plus_one,
    token_losses=head.token_losses,
    kept=("running_sum", "attention", "total"),
    again=True,
    ends=recurrence.ends,
)
