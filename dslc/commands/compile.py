"""``dslc compile``: from an .arch file to a directory, or one of its stages on standard output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UserError
from compiler.pipeline import PASSES
from dslc.commands.options import add_json, add_source, compiled
from dslc.config import read_config
from dslc.terminal import large, steps

if TYPE_CHECKING:
    from dslc.program import Program

DTYPES = ("float32", "bfloat16")
DIALECTS = ("torch", "linalg", "stablehlo", "tosa")


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="where to (build/<name of the file>)"
    )
    parser.add_argument("--backend", choices=("pytorch", "mlir"), default="pytorch")
    parser.add_argument("--target", metavar="NAME", default="cpu", help="cpu, cuda, sm_90, ...")
    parser.add_argument(
        "--emit",
        choices=("graph", "pytorch", "triton", "mlir"),
        help="print one form of the program and write nothing",
    )
    parser.add_argument(
        "--dialect", choices=DIALECTS, help="with --emit mlir: linalg (what is compiled) or another"
    )
    parser.add_argument("--after", metavar="PASS", help="with --emit graph: as that pass left it")
    parser.add_argument(
        "--verify", action="store_true", help="run the program before and after each pass, compare"
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="compile decoding to machine code of this CPU; takes a C++ compiler and a minute",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="that --optimize, --backend mlir or a GPU's kernels are compiled for (as config.json "
        "says; else bfloat16, float32 with --backend mlir)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    if options.dialect and options.emit != "mlir":
        raise UserError("--dialect says what --emit mlir prints")
    if options.after and options.emit not in (None, "graph"):
        raise UserError(
            f"--after says which graph is printed, and --emit {options.emit} prints none"
        )
    if options.json and (options.emit or options.after):
        raise UserError("--json tells what was written; --emit prints text and writes nothing")
    mlir = options.backend == "mlir" or options.emit == "mlir"
    on_cpu = options.target == "cpu"
    if options.emit == "triton" and on_cpu:
        raise UserError("--emit triton prints a GPU's kernels: name one, as in --target sm_90")
    if options.optimize and mlir:
        raise UserError("--optimize compiles the PyTorch backend's decoding, not --backend mlir's")
    if options.optimize and not on_cpu:
        raise UserError(f"--optimize compiles for the CPU, not for --target {options.target}")
    if options.dtype and on_cpu and not options.optimize and not mlir:
        raise UserError(
            "--dtype says what --optimize, --backend mlir or a GPU's kernels are compiled for; "
            "dslc run takes a --dtype too"
        )
    with steps(options.file) as show:
        program = compiled(options, show, options.verify)
    if options.emit == "mlir":
        print(program.mlir(options.dialect or "linalg", _dtype(options, "float32")), end="")
        return 0
    if options.emit or options.after:
        print(_text(program, options), end="")
        return 0
    held = program.held_kernels() if options.verify else []
    output = options.output or Path("build") / Path(options.file).stem
    if options.optimize or mlir:
        dtype = _dtype(options, "float32" if mlir else "bfloat16")
        with steps(options.file) as show:
            program.save(output, dtype, progress=show)
    else:
        with steps(options.file) as show:
            program.save(output, progress=show)
    report = program.report()
    if options.json:
        found = {"directory": str(output), "model": program.name, "parameters": report.parameters}
        if program.generated is not None:
            from dslc.gpu import resources

            found |= resources(program.generated, program.binaries())
        print(json.dumps(found))
    else:
        print(f"{output}: {program.name}, {large(report.parameters)} parameters")
        if program.generated is not None:
            from dslc.gpu import show_kernels

            show_kernels(program.generated, program.binaries())
        if options.verify:
            print(f"verified: {', '.join(PASSES)} change no result on a small random instance")
            for kernel in held:
                print(f"verified: kernel {kernel} is what its equations say")
    return 0


def _text(program: Program, options: argparse.Namespace) -> str:
    """What ``--emit`` prints."""
    if options.emit == "pytorch":
        return program.code()
    if options.emit == "triton":
        assert program.generated is not None
        return program.generated.kernels
    return program.graph(options.after)


def _dtype(options: argparse.Namespace, otherwise: str) -> str:
    """What is compiled for a dtype is compiled for this one."""
    if options.dtype:
        return str(options.dtype)
    config = read_config(options.checkpoint) if options.checkpoint else {}
    stored = config.get("dtype", config.get("torch_dtype"))
    return stored if stored in DTYPES else otherwise
