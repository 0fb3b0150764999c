"""Damaged files give diagnostics or nothing: no crash, no hang, whatever the damage.

``tests/dsl/fuzz.py`` does the same ten thousand times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import BYTES, DSV3, KINDS, TEXT, Mutation, mutate, sources

from compiler.passes import elaborate
from compiler.verify import verify
from dsl import files
from dsl import syntax as ast
from dsl.diagnostics import DiagnosticError, Diagnostics, Source
from dsl.program import check_file, open_program

SOURCES = sources()
LONGEST = 10.0  # seconds; the usual is a tenth of one

SHARE = st.integers(0, 10**6 - 1)
MUTATIONS = st.lists(
    st.builds(Mutation, st.sampled_from(KINDS), SHARE, SHARE, st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=4,
)


def hold(folder: Path, data: bytes) -> None:
    """What is promised: diagnostics or nothing, and elaboration refuses only with diagnostics."""
    path = folder / "damaged.arch"
    path.write_bytes(data)
    start = time.process_time()  # of this process: other work does not count
    mistakes = [d for d in check_file(str(path), warnings=True) if not d.is_warning]
    for diagnostic in mistakes:
        assert diagnostic.message and diagnostic.render()
    if not mistakes:
        try:
            program = open_program(str(path))
            if program.model is not None:
                verify(elaborate.run(program), "elaborate")
        except DiagnosticError as error:
            assert error.diagnostics
    assert time.process_time() - start < LONGEST


@pytest.fixture(scope="module", autouse=True)
def shipped_files_are_parsed_once() -> Iterator[None]:
    """What a damaged file imports is whole, and the same each time."""
    parse, kept = files.parse, {}

    def once(source: Source, found: Diagnostics) -> ast.File:
        if not source.name.startswith(("std/", "models/")):
            return parse(source, found)
        if source.name not in kept:
            kept[source.name] = parse(source, found)
        return kept[source.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "parse", once)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(source=st.sampled_from(sorted(SOURCES)), mutations=MUTATIONS)
def test_a_damaged_file_gives_diagnostics_or_nothing(
    folder: Path, source: str, mutations: list[Mutation]
) -> None:
    hold(folder, mutate(SOURCES[source], mutations))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda t: t.encode())))
def test_so_does_noise(folder: Path, data: bytes) -> None:
    hold(folder, data)


@pytest.mark.parametrize("kind", [*TEXT, *BYTES])
def test_every_kind_of_damage_is_done(folder: Path, kind: str) -> None:
    """Each kind once or more, so that none is left to chance; and it does something."""
    data = SOURCES[DSV3]
    changed = False
    for seed in range(2):
        damaged = mutate(data, [Mutation(kind, 300_000 + seed * 300_000, 700_000, seed)])
        changed |= damaged != data
        hold(folder, damaged)
    assert changed


# What once went wrong, or would with other limits.
DEEP = 1000
NASTY = {
    "parentheses": f"const a = {'(' * DEEP}1{')' * DEEP}",
    "unclosed": f"block B[d] {{ def (x[d]) -> y[d] {{ y[d] = {'f(' * DEEP}",
    "minus": f"const a = {'-' * DEEP}1",
    "conditions": "block B[d] {" + "if d == 1 {" * DEEP + "}" * DEEP + "}",
    "else if": "block B[d] {" + "if a == 1 { } else " * DEEP + "if a == 2 { } }",
    "braces": "{" * DEEP,
    "pluses": "const a = 1" + " + 1" * DEEP,
    "doubling": "const a0 = 1\n"
    + "".join(f"const a{n} = a{n - 1} + a{n - 1}\n" for n in range(1, 400)),
    "backwards": "".join(f"const a{n} = a{n + 1}\n" for n in range(900)) + "const a900 = 1",
    "squaring": "const a0 = 3\n"
    + "".join(f"const a{n} = a{n - 1} * a{n - 1}\n" for n in range(1, 60))
    + "index d : a59",
    "a product of sums": "const a = 1\nconst b = 1\nindex d : " + "*".join(["(a+b)"] * 50),
    "const functions": "const fn f0(x) = x\n"
    + "".join(f"const fn f{n}(x) = f{n - 1}(x) + f{n - 1}(x)\n" for n in range(1, 40))
    + "const a = f39(1)",
    "functions": "fn f0(x) -> y { y = x }\n"
    + "".join(f"fn f{n}(x) -> y {{ y = f{n - 1}(x) + f{n - 1}(x) }}\n" for n in range(1, 60)),
    "blocks": "block B0[d] { def (x[d]) -> y[d] { y[d] = 2 * x[d] } }\n"
    + "".join(
        f"block B{n}[d] {{ use b = B{n - 1}[d] def (x[d]) -> y[d] {{ y[d] = b(b(x[d])) }} }}\n"
        for n in range(1, 300)
    ),
    "many conditions": "".join(f"const c{n} = {n}\n" for n in range(40))
    + "block B[d] { def (x[d]) -> y[d] { "
    + "".join(f"if c{n} > 3 {{ v{n}[d] = x[d] * 2 }} " for n in range(40))
    + "y[d] = x[d] * 2 } }",
    "a power": "const a = 9 ^ 9 ^ 9 ^ 9 ^ 9",
    "a shift": "const a = 2 ^ 1000000000000",
    "presets": "const a = 1\n"
    + "".join(f"dims p{n} of p{n + 1} {{ a = {n} }}\n" for n in range(500)),
    "one line": " ".join(["block B[d] { def (x[d]) -> y[d] { y[d] = wrong[d] * x[d] } }"] * 100),
    "quotes": '"' * 5000,
    "comment": "#" * 100_000,
    "names": "const " + "a" * 100_000 + " = 1",
    "subscripts": "block B[d] { def (x[d]) -> y[d] { y[d] = "
    + "x[" * 500
    + "d"
    + "]" * 500
    + " } }",
    "alternatives": "require config a = " + " | ".join(map(str, range(5000))),
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nothing_nests_or_grows_beyond_bounds(folder: Path, text: str) -> None:
    hold(folder, text.encode())


def test_imports_without_end(folder: Path) -> None:
    for n in range(120):
        (folder / f"deep{n}.arch").write_text(f"import deep{n + 1}\nconst c{n} = {n}\n")
    (folder / "deep120.arch").write_text("const c120 = 1\n")
    hold(folder, b"import deep0\n")
    assert [d.code for d in check_file(str(folder / "deep0.arch"))] == ["E0202"]
