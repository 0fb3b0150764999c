"""The shape of the house: who imports whom, what start-up costs, what the compiler may know."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "dsl": set(),
    "compiler": {"dsl"},
    "backends": {"dsl", "compiler"},
    "dslc": {"dsl", "compiler", "backends"},
}
NOT_FOR_THE_PRODUCT = {"tests", "benchmarks"}
MOST_LINES = 450

# Extras whose import name is not the distribution's.
IMPORT_NAMES = {
    "iree-base-compiler": "iree",
    "iree-base-runtime": "iree",
    "torch-mlir": "torch_mlir",
}

# Models, families and blocks that compiler/ and backends/ must not know, beside those that
# models/ declares: short names as words (moe_gate, MoEGate, but not "memoed"), long ones anywhere.
SHORT_NAMES = ["MLA", "MoE", "MTP", "GPT", "GLM", "YaRN", "DSA"]
LONG_NAMES = ["deepseek", "dsv3", "llama", "qwen", "mixtral", "mistral", "gemma", "kimi"]


def python_files(*folders: str) -> list[Path]:
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.py")]
    assert files, f"no Python in {folders}"
    return sorted(files)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of each import, lazy ones and `import_module("...")` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name.split(".")[0]) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.split(".")[0]
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module.split(".")[0]


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    forbidden = (MAY_IMPORT.keys() | NOT_FOR_THE_PRODUCT) - MAY_IMPORT[package] - {package}
    wrong = [
        f"{place(path, line)} imports {name}"
        for path in python_files(package)
        for line, name in imported(path)
        if name in forbidden
    ]
    assert not wrong


def test_imports_are_declared() -> None:
    """A package that is not in pyproject.toml would be missing where the wheel is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["triton"], *extras["mlir"]]
    declared = {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements}
    allowed = {IMPORT_NAMES.get(name, name) for name in declared}
    allowed |= sys.stdlib_module_names | MAY_IMPORT.keys()
    # dslc measures a model against what the user has; no other package may.
    peers = {"transformers", "gguf", "llama_cpp"}
    wrong = [
        f"{place(path, line)} imports {name}"
        for package in MAY_IMPORT
        for path in python_files(package)
        for line, name in imported(path)
        if name not in allowed | (peers if package == "dslc" else set())
    ]
    assert not wrong


def modules_loaded_by(*arguments: str) -> set[str]:
    """Top-level names of all modules that a Python process loads."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    timed = [line for line in lines if line.startswith("import time:")]
    said = "\n".join(line for line in lines if line not in timed)
    assert done.returncode == 0, f"{' '.join(arguments)}: status {done.returncode}\n{said}"
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        ("-c|import dslc.cli", {"torch", "networkx"}),
        ("-m|dslc|check|models/dsv3.arch", {"torch", "networkx"}),
        ("-m|dslc|inspect|models/dsv3.arch|--json", {"torch"}),
        ("-m|dslc|compile|models/dsv3.arch|-o|{out}", {"torch"}),
        ("-m|dslc|compile|models/dsv3.arch|--emit|graph", {"torch"}),
    ],
    ids=["import", "check", "inspect", "compile", "emit"],
)
def test_start_up_stays_light(arguments: str, heavy: set[str], tmp_path: Path) -> None:
    loaded = modules_loaded_by(*arguments.format(out=tmp_path / "out").split("|"))
    assert "dslc" in loaded
    heavy = heavy | {"transformers", "sympy", "triton", "torch_mlir", "iree"}
    assert sorted(loaded & heavy) == []


def names_of_models() -> re.Pattern[str]:
    files = list((ROOT / "models").rglob("*.arch"))
    assert files
    declared = {
        name
        for file in files
        for name in re.findall(r"^\s*(?:block|model)\s+(\w+)", file.read_text(), re.MULTILINE)
        if sum(letter.isupper() for letter in name) > 1  # not Layer, Dense, ...: plain words
    }
    short = "|".join(sorted({*SHORT_NAMES, *declared}))
    lower = "|".join(sorted(name.lower() for name in SHORT_NAMES))
    anywhere = "|".join(LONG_NAMES)
    return re.compile(
        rf"(?<![A-Z])(?:{short})(?![a-z])|(?i:(?<![a-z])(?:{lower})(?![a-z])|{anywhere})"
    )


@pytest.mark.parametrize("package", ["compiler", "backends"])
def test_no_model_has_a_name_here(package: str) -> None:
    pattern = names_of_models()
    wrong = [
        f"{place(path, number)}: {line.strip()}"
        for path in sorted((ROOT / package).rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not wrong


def test_files_stay_small() -> None:
    """A module that grows past this is asked what it really is two of."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*MAY_IMPORT, "tests", "benchmarks")
    }
    assert not {name: lines for name, lines in sizes.items() if lines > MOST_LINES}


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names, whatever folder they are in."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
