"""The module as text, in one of several dialects, verified and able to be parsed back.

``linalg`` is what is compiled. The others have one function, ``step``: the logits of ``TOKENS``
tokens of one sequence, from nothing cached; its arguments are the tokens and the stacked weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.mlir.artifact import ELEMENTS, INSTALL
from backends.mlir.lower import Frame
from backends.mlir.module import lower, supported
from backends.mlir.step import ENTRY, Step, Weights, key_of
from backends.mlir.torch_dialect import Torch, torch_type
from backends.mlir.values import BATCH, Axis, Code, Element, Value
from compiler.errors import UserError
from compiler.ir import Program
from compiler.tensors import Pattern, caches, patterns

TOKENS = 16
PIPELINES = {
    "stablehlo": "torch-backend-to-stablehlo-backend-pipeline",
    "tosa": "torch-backend-to-tosa-backend-pipeline",
}


def emit(program: Program, elaborated: Program, dialect: str, dtype: str) -> str:
    """
    Args:
        elaborated: the same program before any pass, which says what is cached.
        dialect: linalg, torch, stablehlo or tosa.

    Raises:
        UserError: the extra is not installed, or torch-mlir cannot lower the module.
        Unsupported: the program has something without a lowering.
    """
    if dialect == "linalg":
        return _verified(lower(program, caches(elaborated), ELEMENTS[dtype]).text)
    text = torch_text(program, ELEMENTS[dtype])
    try:
        from torch_mlir import ir
        from torch_mlir.dialects import torch as torch_dialect
        from torch_mlir.passmanager import PassManager
    except ImportError:
        raise UserError(f"--dialect {dialect} needs torch-mlir: {INSTALL}") from None
    with ir.Context() as context:
        torch_dialect.register_dialect(context)
        module = ir.Module.parse(text)
        passes = ["torchdynamo-export-to-torch-backend-pipeline"] if dialect in PIPELINES else []
        passes += [PIPELINES[dialect]] if dialect in PIPELINES else []
        for name in passes:
            try:
                PassManager.parse(f"builtin.module({name})").run(module.operation)
            except ir.MLIRError as error:
                said = str(error).splitlines()
                raise UserError(
                    f"torch-mlir cannot lower the module to {dialect}: {' '.join(said[:2])}"
                ) from None
        module.operation.verify()
        found = f"{module}\n"
        ir.Module.parse(found)
        return found


def _verified(text: str) -> str:
    try:
        from iree.compiler import ir
    except ImportError:
        raise UserError(f"--emit mlir needs IREE's compiler: {INSTALL}") from None
    with ir.Context():
        module = ir.Module.parse(text)
        module.operation.verify()
        return f"{module}\n"


class _Arguments(Torch):
    """Stacked weights as arguments of the function, in the order in which they are read first."""

    def __init__(self, code: Code):
        super().__init__(code)
        self.weights: dict[str, Value] = {}

    def stored(self, key: str, value: Value) -> Value:
        named = Value(f"%weight{len(self.weights)}", value.axes, value.element)
        return self.weights.setdefault(key, named)


def torch_text(program: Program, element: Element, tokens: int = TOKENS) -> str:
    """One step of a sequence in the torch dialect. The name of each weight is an attribute of its
    argument."""
    text, _ = torch_step(program, element, tokens)
    return text


def torch_step(
    program: Program, element: Element, tokens: int = TOKENS
) -> tuple[str, Mapping[str, Pattern]]:
    """The text, and the weights in the order of the arguments behind the tokens."""
    supported(program)
    code = Code()
    ops = _Arguments(code)
    batch = Axis(BATCH, 1)
    weights = Weights({(p.path, p.ranges): p for p in patterns(program)}, element)
    given = Value("%tokens", (batch, Axis("@time", tokens)), "i64")
    past = ops.full(Value("", (), "i64", 0), [batch])
    step = Step(
        program, code, ops, element, weights, 1, tokens, 0, tokens, past, None, None, {}, {}
    )
    body = program.bodies[program.entries[ENTRY].body]
    frame = Frame.entry(step, body, given)
    logits = frame.settled(frame.evaluate())
    logits = ops.cast(ops.full(logits, [frame.axis(d) for d in body.result.type.dims]), "f32")
    arguments = [f"%tokens: {torch_type(given.axes, 'i64')}"]
    for key, value in ops.weights.items():
        type = torch_type(value.axes, value.element)
        arguments.append(f'{value.name}: {type} {{dslc.weight = "{key}"}}')
    type = torch_type(logits.axes, "f32")
    head = [f"    {name} = {what}" for name, what in ops.head.items()]
    lines = [
        "module {",
        f"  func.func @step({', '.join(arguments)}) -> {type} {{",
        *head,
        *code.lines,
        f"    return {logits.name} : {type}",
        "  }",
        "}",
    ]
    listed = {key_of(p): p for p in weights.patterns.values()}
    return "\n".join(lines) + "\n", {key: listed[key] for key in ops.weights}
