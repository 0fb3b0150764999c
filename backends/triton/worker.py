"""A process that compiles kernels: one request a line on standard input, one answer a line back.

It imports Triton and nothing of this project, and is run as a script: with TRITON_INTERPRET set,
Triton's functions cannot be compiled, so the process that asks may have it set and this one not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# What multiplies matrices: Hopper's warpgroup products, Blackwell's, the older ones, AMD's.
PRODUCTS = re.compile(r"\b([HQIBD]GMMA|UTC[HQI]MMA|[HQIBD]MMA|OMMA|v_mfma|v_smfmac)\b|\b(v_s?mf)")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


def main() -> None:
    # What Triton or LLVM print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = compile_one(request)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel, write binary and metadata into ``folder``, and say what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = _cpu()
    function = _function(request)
    attributes = {(index,): [["tt.divisibility", 16]] for index in request["aligned"]}
    source = ASTSource(function, request["signature"], request["constants"], attributes)
    backend, arch, warp = request["target"]
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    binary = compiled.asm["cubin" if backend == "cuda" else "hsaco"]
    folder = Path(request["folder"])
    ending = "cubin" if backend == "cuda" else "hsaco"
    (folder / f"kernel.{ending}").write_bytes(binary)
    metadata = next(p for name, p in compiled.metadata_group.items() if name.endswith(".json"))
    (folder / "kernel.json").write_bytes(Path(metadata).read_bytes())
    used = _nvidia(folder / "kernel.cubin") if backend == "cuda" else _amd(compiled.asm["amdgcn"])
    return {
        **used,
        "shared": compiled.metadata.shared,
        "seconds": round(_cpu() - start, 3),
    }


def _cpu() -> float:
    """Seconds of a core that this process and those it ran have taken."""
    return sum(os.times()[:4])


def _function(request: dict[str, Any]) -> Any:
    """The kernel, from a file: Triton reads the text of a function off its file."""
    path = Path(request["folder"]) / f"{request['name']}.py"
    path.write_text(request["text"], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(request["name"], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, request["name"])


def _nvidia(cubin: Path) -> dict[str, Any]:
    """Registers and stack as cuobjdump says; spills and products as the machine code has them."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    usage = _output(tool, "-res-usage", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    sass = _output(tool, "-sass", cubin)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(LOCAL.findall(sass)),
        "products": _products(sass),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}: +(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "products": _products(assembly),
    }


def _products(text: str) -> dict[str, int]:
    return dict(Counter(m[1] or "v_mfma" for m in PRODUCTS.finditer(text)))


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    # Triton's own cache of what it compiled: ours, which knows what it is asked for, is in front.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
