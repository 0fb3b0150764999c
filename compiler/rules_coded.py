"""Type rules of the ops on coded values: codes and their scales (``compiler/coding.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compiler.ir import Node, Parameter, Type

if TYPE_CHECKING:
    from compiler.rules import Scope


def stored(parameter: Parameter) -> Type:
    """What a parameter is as it is kept."""
    from compiler.rules import need

    coding = parameter.coding
    need(coding is not None, f"'{parameter.name}' is not stored as codes")
    assert coding is not None
    columns = parameter.type.names[1:] or parameter.type.names
    return Type("coded", parameter.type.dims, coding=coding.along(*columns))


def quantize(node: Node, operands: list[Node], scope: Scope) -> Type:
    from compiler.rules import dim_of, need

    (operand,) = operands
    coding = node.attrs["coding"]
    need(operand.type.dtype in ("act", "f32"), f"only numbers are quantised, not {operand.type}")
    need(bool(coding.over), "a coding says which dims its columns are")
    for name in coding.over:
        dim_of(operand.type, name)
    return Type("coded", operand.type.dims, coding=coding)


def dequantize(node: Node, operands: list[Node], scope: Scope) -> Type:
    from compiler.rules import need

    (operand,) = operands
    need(operand.type.dtype == "coded", f"{operand.type} is not coded")
    need(node.type.dtype in ("act", "f32"), "codes stand for numbers of act or f32")
    return Type(node.type.dtype, operand.type.dims)


def scaled_contract(node: Node, operands: list[Node], scope: Scope) -> Type:
    from compiler.rules import need, union

    dims = union(n.type for n in operands)
    over = node.attrs["over"]
    missing = [name for name in over if name not in {d.name for d in dims}]
    need(not missing, f"no operand has the summed dims {', '.join(missing)}")
    own = node.attrs.get("quantises", ())
    need(not own or len(own) == len(operands), "'quantises' has a coding, or null, per operand")
    for operand, coding in zip(operands, own, strict=False):
        need(operand.type.dtype in ("act", "f32", "coded"), f"a product of {operand.type}")
        need(
            coding is None or set(coding.over) <= set(operand.type.names),
            f"{operand.type} has not the columns of {{{coding}}}",
        )
        need(coding is None or operand.type.dtype != "coded", f"{operand.type} is quantised twice")
    need(node.type.dtype in ("act", "f32"), "a product is act or f32")
    return Type(node.type.dtype, tuple(d for d in dims if d.name not in over))
