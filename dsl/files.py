"""Which files make up a model: reading, importing, and what each file can see."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dsl import syntax as ast
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Source, near
from dsl.parse import parse

EDITION = "2026"
STD = Path(__file__).with_name("std")
LARGEST_FILE = 4 * 1024 * 1024  # bytes; an .arch file is a few pages of equations

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


@dataclass
class Library:
    """A model's files, imported ones first, the file that was asked for last."""

    units: list[Unit]

    @property
    def root(self) -> Unit:
        return self.units[-1]

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
            raise DiagnosticError([Diagnostic("E0105", f"{name} is larger than 4 MiB")])
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiagnosticError([Diagnostic("E0201", f"{name} cannot be read: {reason}")]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DiagnosticError(
            [
                Diagnostic(
                    "E0105",
                    f"{name}, line {line}: this is not UTF-8 text",
                    hint="save the file as UTF-8",
                )
            ]
        ) from None
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
        path = self._find(unit, declaration.path)
        if path is None:
            known = [f"std.{p.stem}" for p in STD.glob("*.arch")] + shipped_models()
            self.found.error(
                "E0201",
                f"no file is called '{declaration.path}'",
                declaration.span,
                hint=near(declaration.path, known)
                or "imports reach the file's own folder, the standard library (std.*) and the shipped models",
            )
            for name in declaration.names:
                unit.broken.add(name.text)
            unit.broken.add("*")
            return
        if path.resolve() in open_:
            self.found.error(
                "E0202", f"'{declaration.path}' imports itself in a circle", declaration.span
            )
            unit.broken.add("*")
            return
        try:
            source = read(path, _short(path))
        except DiagnosticError as error:
            self.found.found += error.diagnostics
            unit.broken.add("*")
            return
        other = self.unit(path, source, open_)
        unit.broken |= other.broken
        own = {k: v for k, v in other.visible.items() if v[1] is other}
        wanted = [n.text for n in declaration.names] or list(own)
        for name in declaration.names:
            if (
                name.text not in own
                and name.text not in other.broken
                and not _constant(other, name.text)
            ):
                self.found.error(
                    "E0204",
                    f"{declaration.path} declares no '{name.text}'",
                    name.span,
                    hint=near(name.text, own),
                )
        for name_ in wanted:
            if name_ in own:
                before = unit.visible.get(name_)
                if before is not None and before[0] is not own[name_][0]:
                    self.found.error(
                        "E0203",
                        f"'{name_}' is imported twice, with different meanings",
                        declaration.span,
                        notes=[
                            (before[0].name.span, "one is declared here"),
                            (own[name_][0].name.span, "the other here"),
                        ],
                    )
                unit.visible[name_] = own[name_]

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


def _constant(unit: Unit, name: str) -> bool:
    return any(isinstance(d, ast.ConstDecl) and d.name.text == name for d in unit.file.declarations)


def _short(path: Path) -> str:
    """How a file is shown: shipped ones by their place in the project, others as given."""
    for folder, prefix in ((STD, "std"), (models_folder(), "models")):
        if path.resolve().parent == folder.resolve():
            return f"{prefix}/{path.name}"
    return str(path)
