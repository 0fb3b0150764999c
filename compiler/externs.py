"""``extern``: a function of the source that a kernel of its author's may compute.

A composite as others: whoever has no kernel for it runs its ``body``, the function's equations.
"""

from __future__ import annotations

from compiler.spec import NAMES, Attr, composite


def _each(*of: type) -> Attr:
    return Attr(
        "a tuple of tuples of names",
        lambda v: (
            isinstance(v, tuple)
            and all(isinstance(one, tuple) and all(isinstance(n, of) for n in one) for one in v)
        ),
    )


# ``own``: of each operand, then of the result, the dims that the function itself names, in its
# order; what else there is was lifted. ``kernels``: "path:function" by target, in two tuples.
composite(
    "extern",
    "a function of the source, which has kernels of its own for some targets",
    own=_each(str),
    targets=NAMES,
    kernels=NAMES,
)
