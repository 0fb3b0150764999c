"""Which files make up a model: reading, importing, and what each file can see."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dsl import syntax as ast
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Source, Span, near
from dsl.parse import parse

EDITION = "2026"
STD = Path(__file__).with_name("std")
LARGEST_FILE = 2**18  # bytes; an .arch file is a few pages of equations
DEEPEST = 40  # imports of imports

Visible = ast.Block | ast.Fn | ast.ConstFn


def models_folder() -> Path:
    """The shipped models: beside the packages in a source tree, inside ``dslc`` when installed."""
    beside = STD.parent.parent / "models"
    return beside if beside.is_dir() else STD.parent.parent / "dslc" / "models"


def shipped_models() -> list[str]:
    """Names of the shipped ``.arch`` files."""
    return sorted(p.stem for p in models_folder().glob("*.arch"))


@dataclass
class Unit:
    """One file. ``visible`` is what its text may name: its own declarations and what it imports."""

    path: Path
    source: Source
    file: ast.File
    visible: dict[str, tuple[Visible, Unit]] = field(default_factory=dict)
    indices: dict[str, ast.IndexDecl] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    reached: set[Path] = field(default_factory=set)  # the files it imports, through others too

    def imports(self, other: Unit) -> bool:
        """Does this file import ``other``, itself or through others?"""
        return other.path in self.reached


@dataclass
class Library:
    """A model's files, imported ones first, the file that was asked for last."""

    units: list[Unit]

    @property
    def root(self) -> Unit:
        return self.units[-1]

    def index_elsewhere(self, name: str) -> ast.IndexDecl | None:
        """An index of this name that some file declares at its left margin."""
        return next((u.indices[name] for u in self.units if name in u.indices), None)

    def declarations(self, kind: type) -> list[tuple[ast.Declaration, Unit]]:
        return [(d, u) for u in self.units for d in u.file.declarations if isinstance(d, kind)]


def locate(name: str) -> Path:
    """The file of a command-line argument: a path, or the name of a shipped model.

    Raises:
        DiagnosticError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise DiagnosticError([Diagnostic("E0201", f"{name} is a folder, not an .arch file")])
    if "/" not in name and (models_folder() / f"{name}.arch").is_file():
        return models_folder() / f"{name}.arch"
    known = shipped_models()
    hint = near(path.stem, known) or f"shipped models: {', '.join(known)}"
    raise DiagnosticError([Diagnostic("E0201", f"there is no file {name}", hint=hint)])


def read(path: Path, shown: str | None = None) -> Source:
    """The text of a file.

    Raises:
        DiagnosticError: it cannot be read, is not UTF-8, or is far too long to be an .arch file.
    """
    name = shown or str(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            most = f"{LARGEST_FILE // 1024} KiB"
            raise DiagnosticError([Diagnostic("E0105", f"{name} is larger than {most}")])
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiagnosticError([Diagnostic("E0201", f"{name} cannot be read: {reason}")]) from None
    try:
        return _source(name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        at = Span(_source(name, data.decode("utf-8", "replace")), line, column, line, column + 1)
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = f"save the file as UTF-8{', not as UTF-16' if utf16 else ''}"
        raise DiagnosticError(
            [Diagnostic("E0105", "this is not UTF-8 text", at, hint=hint)]
        ) from None


def _source(name: str, text: str) -> Source:
    return Source(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def load(path: Path, found: Diagnostics, shown: str | None = None) -> Library:
    """A file and all that it imports."""
    loader = _Loader(found)
    loader.unit(path, read(path, shown or _short(path)), [])
    return Library(loader.order)


class _Loader:
    def __init__(self, found: Diagnostics):
        self.found = found
        self.units: dict[Path, Unit] = {}
        self.order: list[Unit] = []

    def unit(self, path: Path, source: Source, open_: list[Path]) -> Unit:
        key = path.resolve()
        if key in self.units:
            return self.units[key]
        file = parse(source, self.found)
        unit = self.units[key] = Unit(path, source, file, broken=set(file.broken))
        edition = file.edition
        if edition is not None and edition.text != EDITION:
            self.found.error(
                "E0106",
                f"this file is written in edition {edition.text[:20]} of the language",
                edition.span,
                hint=f"this dslc reads edition {EDITION}",
            )
        for declaration in file.declarations:
            if isinstance(declaration, ast.Import):
                self._import(unit, declaration, [*open_, key])
        self._own(unit)
        self.order.append(unit)
        return unit

    def _import(self, unit: Unit, declaration: ast.Import, open_: list[Path]) -> None:
        wanted, at = declaration.path.text, declaration.path.span
        path = self._find(unit, wanted)
        missing = {n.text for n in declaration.names} or {"*"}
        if path is None:
            self.found.error(
                "E0201",
                f"no file is called '{wanted}'",
                at,
                hint=near(wanted, self._importable(unit))
                or "imports reach the file's folder, the standard library (std.*), shipped models",
            )
            unit.broken |= missing
            return
        if path.resolve() in open_:
            circle = [p.stem for p in open_[open_.index(path.resolve()) :]] + [path.stem]
            shown = " imports ".join(
                circle if len(circle) < 8 else [*circle[:6], "...", circle[-1]]
            )
            self.found.error("E0202", "these files import each other in a circle", at, shown)
            unit.broken |= missing
            return
        if len(open_) > DEEPEST:
            self.found.error("E0202", f"imports nest more than {DEEPEST} deep", at)
            unit.broken |= missing
            return
        try:
            source = read(path, _short(path))
        except DiagnosticError as error:
            for d in error.diagnostics:
                self.found.error(d.code, d.message, d.span or at, hint=d.hint)
            unit.broken |= missing
            return
        other = self.unit(path, source, open_)
        unit.reached |= {other.path, *other.reached}
        unit.broken |= other.broken
        own = {k: v for k, v in other.visible.items() if v[1] is other}
        for name in declaration.names:
            if name.text not in (own.keys() | other.broken) and not _declares(other, name.text):
                self.found.error(
                    "E0204",
                    f"{wanted} declares no '{name.text}'",
                    name.span,
                    hint=near(name.text, own) or f"it declares {', '.join(own) or 'nothing'}",
                )
                unit.broken.add(name.text)
                unit.broken |= {d for d in own if near(name.text, [d])}
        for text in [n.text for n in declaration.names] or list(own):
            if text in own:
                before = unit.visible.get(text)
                if before is not None and before[0] is not own[text][0]:
                    self.found.error(
                        "E0203",
                        f"'{text}' is imported twice, with different meanings",
                        at,
                        notes=[
                            (before[0].name.span, "one is declared here"),
                            (own[text][0].name.span, "the other here"),
                        ],
                    )
                unit.visible[text] = own[text]

    def _importable(self, unit: Unit) -> list[str]:
        """What an import could name."""
        beside = [p.stem for p in unit.path.parent.glob("*.arch")]
        return [f"std.{p.stem}" for p in STD.glob("*.arch")] + shipped_models() + beside

    def _find(self, unit: Unit, name: str) -> Path | None:
        parts = name.split(".")
        if parts[0] == "std":
            places = [STD.joinpath(*parts[1:]).with_suffix(".arch")] if len(parts) > 1 else []
        else:
            places = [
                folder.joinpath(*parts).with_suffix(".arch")
                for folder in (unit.path.parent, models_folder())
            ]
        return next((p for p in places if p.is_file()), None)

    def _own(self, unit: Unit) -> None:
        for d in unit.file.declarations:
            if isinstance(d, (ast.Block, ast.Fn, ast.ConstFn)):
                before = unit.visible.get(d.name.text)
                if before is not None and before[1] is unit:
                    self.found.error(
                        "E0203",
                        f"'{d.name.text}' is declared twice",
                        d.name.span,
                        notes=[(before[0].name.span, "first declared here")],
                    )
                    continue
                unit.visible[d.name.text] = (d, unit)
            elif isinstance(d, ast.IndexDecl):
                first = unit.indices.get(d.name.text)
                if first is not None:
                    self.found.error(
                        "E0203",
                        f"index '{d.name.text}' is declared twice",
                        d.name.span,
                        notes=[(first.name.span, "first declared here")],
                    )
                    continue
                unit.indices[d.name.text] = d


def exporter(name: str, kinds: str = "block|fn|const fn|format|device|cluster") -> str:
    """The hint for a name that is declared in a file of the standard library; none otherwise."""
    declared = re.compile(rf"^(?:{kinds})\s+{re.escape(name)}\b", re.M)
    for path in sorted(STD.glob("*.arch")):
        if declared.search(path.read_text(encoding="utf-8")):
            return f"std.{path.stem} declares it: import std.{path.stem}"
    return ""


def _declares(unit: Unit, name: str) -> bool:
    """Does a file declare a constant, device, cluster, format or deployment of this name?"""
    kinds = (ast.ConstDecl, ast.Table, ast.Deploy)
    return any(isinstance(d, kinds) and d.name.text == name for d in unit.file.declarations)


def _short(path: Path) -> str:
    """How a file is shown: shipped ones by their place in the project, others as given."""
    for folder, prefix in ((STD, "std"), (models_folder(), "models")):
        if path.resolve().parent == folder.resolve():
            return f"{prefix}/{path.name}"
    return str(path)
