"""What a kernel's backward pass does: FLOPs off the backward graph, bytes by known rules.

The graph that ``differentiate`` builds says which products there are for operands and for
parameters, which are computed again, and what no gradient reaches (``compiler/training_costs.py``).
It is about the whole model; a rank has a share of each product, and its gradients the same share.
How many bytes a kernel moves follows from what it reads and writes forward, as the good ones do it:
a product's operands and result, once for each of its two; an attention's twice; what is bound by
memory reads and writes gradients beside what it read.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiler.passes.activity import bodies_run
from compiler.planning.kernels import Gradient, Kernel
from compiler.training_costs import Backward
from compiler.training_costs import Work as Flops
from dsl.formats import NumberFormat


@dataclass(frozen=True)
class Work:
    """What a kernel does in one phase: at which rates, how many FLOPs and bytes."""

    kernel: str  # whose rate; "" is bound by memory alone
    format: NumberFormat | None
    flops: float
    bytes: float
    wide: bool = False


def gradient_of(kernel: Kernel, graph: Backward) -> Gradient:
    """What the backward graph computes for one forward kernel."""
    if not kernel.ops:
        return Gradient()
    whole = Flops()
    inside = again = 0.0
    for op in kernel.ops:
        if not op.flops:
            continue
        bodies = [body for body, _ in bodies_run(op.node)]
        if bodies:  # an attention, a recurrence: all that it runs is one kernel
            found = sum((graph.of(body) for body in bodies), Flops())
            repeated = max(graph.repeated.get(body, 0.0) for body in bodies)
            anew = 0.0
        else:
            found = graph.products[op.body, op.node.span]
            repeated, anew = graph.repeated.get(op.body, 0.0), found.again
        share = op.flops / found.forward if found.forward else 0.0
        whole += found * share
        again += repeated * op.flops + anew * share
        inside += (found.again - anew) * share
    return Gradient(
        whole.input,
        whole.weight,
        inside,
        again / whole.forward if whole.forward else 0.0,
        any((op.body, op.node.span) in graph.reached for op in kernel.ops),
    )


def forward_work(kernel: Kernel) -> Work:
    kind = "" if kernel.kind in ("memory", "quantise") else kernel.kind
    return Work(kind, kernel.format, kernel.flops, kernel.bytes, kernel.wide)


def backward_work(kernel: Kernel, width: float) -> tuple[list[Work], list[Work]]:
    """The backward pass of one forward kernel: for its inputs, and for its weights.

    Args:
        width: bytes of a weight gradient's element, which is read and written.
    """
    found = kernel.gradient
    assert found is not None
    moved = kernel.read + kernel.written
    if not found.reached:
        return [], []
    if kernel.kind == "quantise":  # the gradient passes as it is
        return ([Work("", None, 0.0, moved)] if kernel.kept else []), []
    if kernel.kind in ("attention", "decode_attention"):
        flops = found.inputs + found.inside
        return [Work("attention_backward", kernel.format, flops, 2 * moved)], []
    if kernel.kind == "memory":
        flops = found.inputs + found.inside + found.weight
        return [Work("", None, flops, kernel.read + moved)], []
    if kernel.product is None:  # both factors are values: two products, or none
        each = Work(kernel.kind, None, found.inputs / 2, moved, kernel.wide)
        return ([each] * 2 if found.inputs else []), []
    product = kernel.product
    same = product.weights.format == product.gradients.format
    format = product.weights.format if same else None
    dgrad, wgrad = list[Work](), list[Work]()
    if found.weight:
        weights = 2 * kernel.parameters * width
        kind = f"{kernel.kind}_wgrad"
        wgrad.append(Work(kind, format, found.weight, moved + weights, kernel.wide))
        if product.activations.turns:  # the kept operand, quantised anew with its tiles turned
            wgrad.append(Work("", None, 0.0, 2 * kernel.read))
    if found.inputs:
        kind = f"{kernel.kind}_dgrad"
        dgrad.append(Work(kind, format, found.inputs, moved + kernel.weights, kernel.wide))
    if kernel.separate and product.gradients.format is not None:
        forms = 2 if product.gradients.turns else 1
        comes = kernel.own
        if kernel.sent_back:  # quantised already, in one of the forms
            comes, forms = product.gradients.bytes, forms - 1
        moved = kernel.results * (comes + forms * product.gradients.bytes)
        dgrad.append(Work("", None, 0.0, moved))
    return dgrad, wgrad
