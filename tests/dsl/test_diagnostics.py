"""Every kind of mistake is answered as ``mistakes/*.txt`` says, word for word, and only so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mistakes import Case, cases, inside, said

from dsl.program import check_file
from dslc.cli import run

CASES = cases()
CODE = re.compile(r"\b[EW]0[0-9]{3}\b")
DSL = Path(__file__).parents[2] / "dsl"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mistake_is_answered(case: Case) -> None:
    assert said(case) == case.message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_title_names_the_code(case: Case) -> None:
    assert case.code in CODE.findall(case.message)


def test_there_are_many_kinds() -> None:
    assert len({(c.code, c.title) for c in CASES}) == len(CASES) >= 35
    assert len({c.code for c in CASES}) >= 35


def test_every_code_has_a_test() -> None:
    """Codes are the language's own words for its mistakes: none goes untested."""
    used = {code for path in DSL.rglob("*.py") for code in CODE.findall(path.read_text("utf-8"))}
    tests = Path(__file__).parent
    tested = {
        code
        for path in [*tests.glob("*.py"), *tests.glob("mistakes/*.txt")]
        for code in CODE.findall(path.read_text("utf-8"))
    }
    tested |= {f"E08{number:02}" for number in range(1, 22)}  # by test_deploy_mistakes.py
    assert used - tested == set()


# -- what no text file can hold --------------------------------------------------------------------


def check(folder: Path, data: bytes, name: str = "main.arch") -> str:
    (folder / name).write_bytes(data)
    with inside(folder):
        return "\n\n".join(d.render() for d in check_file(name))


def test_windows_line_ends_a_bom_and_tabs_are_read_alike(tmp_path: Path) -> None:
    text = "block Double[d] {\n\tdef (x[d]) -> y[d] {\n\t\ty[d] = 2 * z[d]\n\t}\n}\n"
    expected = (
        "error[E0204]: nothing is called 'z'\n"
        "  --> main.arch:3:14\n"
        "  |\n"
        "3 |   y[d] = 2 * z[d]\n"
        "  |              ^"
    )
    plain = check(tmp_path, text.encode())
    assert plain == expected
    assert check(tmp_path, text.replace("\n", "\r\n").encode()) == plain
    assert check(tmp_path, text.replace("\n", "\r").encode()) == plain
    assert check(tmp_path, b"\xef\xbb\xbf" + text.encode()) == plain


def test_latin_1_is_refused_where_it_shows(tmp_path: Path) -> None:
    assert check(tmp_path, "const a = 1\n# gr\u00f6\u00dfer\n".encode("latin-1")) == (
        "error[E0105]: this is not UTF-8 text\n"
        "  --> main.arch:2:5\n"
        "  |\n"
        "2 | # gr\ufffd\ufffder\n"
        "  |     ^\n"
        "  hint: save the file as UTF-8"
    )


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    assert "hint: save the file as UTF-8, not as UTF-16" in check(
        tmp_path, "const a = 1\n".encode("utf-16")
    )


def test_a_nul_byte_and_a_no_break_space_are_named(tmp_path: Path) -> None:
    assert check(tmp_path, b"const a = 1\x00\n") == (
        "error[E0102]: the invisible character U+0000 cannot stand here\n"
        "  --> main.arch:1:12\n"
        "  |\n"
        "1 | const a = 1\ufffd\n"
        "  |            ^\n"
        "  hint: delete it, or put a space in its place"
    )
    assert "the invisible character U+00A0" in check(tmp_path, "const\u00a0a = 1\n".encode())


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in check(tmp_path, b"const a = \x1b[2J 1\n")


def test_a_large_file_is_no_arch_file(tmp_path: Path) -> None:
    assert check(tmp_path, b"#" * (2**18 + 1)) == "error[E0105]: main.arch is larger than 256 KiB"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with inside(tmp_path):
        (message,) = check_file("modle.arch")
        assert message.render() == (
            "error[E0201]: there is no file modle.arch\n"
            "  hint: shipped models: " + message.hint.removeprefix("shipped models: ")
        )
        (message,) = check_file("dsv33")
        assert message.render() == (
            "error[E0201]: there is no file dsv33\n  hint: did you mean 'dsv3'?"
        )
        Path("folder.arch").mkdir()
        (message,) = check_file("folder.arch")
        assert message.render() == "error[E0201]: folder.arch is a folder, not an .arch file"


def test_a_hundred_mistakes_are_a_hundred_messages(tmp_path: Path) -> None:
    """Each declaration is read for itself, so that no mistake hides the next."""
    text = "".join(
        f"block B{n}[d] {{\n  def (x[d]) -> y[d] {{ y[d] = wrong{n}[d] + x[d] }}\n}}\n"
        f"const c{n} = = {n}\n"
        for n in range(50)
    )
    (tmp_path / "main.arch").write_text(text)
    found = check_file(str(tmp_path / "main.arch"))
    assert [d.code for d in found] == ["E0204", "E0101"] * 50
    assert [d.span.line for d in found if d.span] == sorted(d.span.line for d in found if d.span)


def test_messages_come_in_the_order_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "main.arch").write_text("const c = q\nindex d : nope\nconst b = r\n")
    found = check_file(str(tmp_path / "main.arch"))
    assert [d.span.line for d in found if d.span] == [1, 2, 3]


def test_a_warning_is_told_and_is_no_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "block B[d] {\n  param W[d]\n  def (x[d]) -> y[d] { y[d] = 2 * x[d] }\n}\n"
    Path("main.arch").write_text(text)
    assert run(["check", "main.arch"]) == 0
    told = capsys.readouterr()
    assert told.out == "main.arch: no mistakes\n"
    assert told.err.startswith("warning[W0511]: 'W' is stored, and no equation reads it\n")
    assert [d.code for d in check_file("main.arch")] == []  # mistakes alone stop a compilation
