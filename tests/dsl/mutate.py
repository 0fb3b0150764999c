"""Damages ``.arch`` files, as slips, editors, merges and bad luck do."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN = re.compile(r'#[^\n]*|"[^"\n]*"|[A-Za-z_]\w*|\d[\d.e+-]*|->|\.\.|[<>=!]=|\S')
NAME = re.compile(r"[A-Za-z_]\w*")
NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")
PIECES = """
    index const config else require dims names ignore fn block model param state use def if then
    let cached and or not inf true false null time history of sum mean max softmax top argtop in_top
    where stack concat broadcast chain position size t s d x 0 1 2 -1 0.5
    [ ] ( ) { } , : = == != < <= > >= + - * / ^ | -> . .. # " ' ; @ %
""".split()
NUMBERS = [*"0 1 2 3 7 0.5 1e-6 1e300 1e999 4611686018427387905".split(), "9" * 60]


@dataclass(frozen=True)
class Mutation:
    """What is done, and where: ``at`` and ``to`` are shares of the text, in millionths."""

    kind: str
    at: int
    to: int
    seed: int

    def apply(self, data: bytes) -> bytes:
        rng = random.Random(self.seed)
        if self.kind in BYTES:
            return BYTES[self.kind](data, self.at, self.to, rng)
        text = data.decode("utf-8", "surrogateescape")
        return TEXT[self.kind](text, self.at, self.to, rng).encode("utf-8", "surrogateescape")


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    for mutation in mutations:
        data = mutation.apply(data)
    return data


def arbitrary(rng: random.Random) -> list[Mutation]:
    """Mostly one or two slips, at times a heap of them."""
    number = rng.choice([1, 1, 1, 1, 2, 2, 3, 6])
    return [
        Mutation(rng.choice(KINDS), rng.randrange(10**6), rng.randrange(10**6), rng.getrandbits(32))
        for _ in range(number)
    ]


def sources() -> dict[str, bytes]:
    """What is damaged: shipped files, and one that holds a model and all that it imports."""
    paths = [*sorted((ROOT / "models").glob("*.arch")), *sorted((ROOT / "dsl/std").glob("*.arch"))]
    found = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}
    whole = "\n".join(
        (ROOT / path).read_text(encoding="utf-8")
        for path in [*(f"dsl/std/{n}.arch" for n in ("norm", "rotary", "ffn", "mla", "moe")), DSV3]
    )
    alone = re.sub(r"^(?:edition 2026|import .*)\n", "", whole, flags=re.MULTILINE)
    once = alone.replace("\nindex t : time\n", "\n", 1)
    return found | {"whole.arch": once.encode()}


DSV3 = "models/dsv3.arch"

# -- characters ------------------------------------------------------------------------------------

Operation = Callable[[str, int, int, random.Random], str]


def _at(text: str | bytes, share: int) -> int:
    return len(text) * share // 10**6


def _delete(text: str, at: int, to: int, rng: random.Random) -> str:
    i = _at(text, at)
    return text[:i] + text[i + rng.choice([1, 1, 2, 5]) :]


def _insert(text: str, at: int, to: int, rng: random.Random) -> str:
    i = _at(text, at)
    return text[:i] + chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000)])) + text[i:]


def _swap(text: str, at: int, to: int, rng: random.Random) -> str:
    i = _at(text, at)
    return text[:i] + text[i : i + 2][::-1] + text[i + 2 :]


def _truncate(text: str, at: int, to: int, rng: random.Random) -> str:
    return text[: _at(text, at)]


def _behead(text: str, at: int, to: int, rng: random.Random) -> str:
    return text[_at(text, at) :]


def _double(text: str, at: int, to: int, rng: random.Random) -> str:
    i, j = sorted((_at(text, at), _at(text, to)))
    j = min(j, i + 2000)
    return text[:j] + text[i:j] + text[j:]


def _move(text: str, at: int, to: int, rng: random.Random) -> str:
    i, j = _at(text, at), _at(text, to)
    length = rng.choice([5, 40, 300])
    cut, rest = text[i : i + length], text[:i] + text[i + length :]
    return rest[:j] + cut + rest[j:]


# -- tokens and lines ------------------------------------------------------------------------------


def _tokens(text: str) -> list[re.Match[str]]:
    return list(TOKEN.finditer(text))


def _replaced(text: str, token: re.Match[str], by: str) -> str:
    return text[: token.start()] + by + text[token.end() :]


def _some(found: list[re.Match[str]], share: int) -> re.Match[str] | None:
    return found[len(found) * share // 10**6] if found else None


def _token_delete(text: str, at: int, to: int, rng: random.Random) -> str:
    token = _some(_tokens(text), at)
    return _replaced(text, token, "") if token else text


def _token_replace(text: str, at: int, to: int, rng: random.Random) -> str:
    token = _some(_tokens(text), at)
    return _replaced(text, token, rng.choice(PIECES)) if token else text


def _token_insert(text: str, at: int, to: int, rng: random.Random) -> str:
    token = _some(_tokens(text), at)
    return _replaced(text, token, f"{rng.choice(PIECES)} {token.group()}") if token else text


def _token_swap(text: str, at: int, to: int, rng: random.Random) -> str:
    found = _tokens(text)
    one, other = _some(found, min(at, to)), _some(found, max(at, to))
    if one is None or other is None or one.end() > other.start():
        return text
    return _replaced(_replaced(text, other, one.group()), one, other.group())


def _name_replace(text: str, at: int, to: int, rng: random.Random) -> str:
    """One name where another stands: most such files still parse."""
    found = list(NAME.finditer(text))
    one, other = _some(found, at), _some(found, to)
    return _replaced(text, one, other.group()) if one and other else text


def _name_everywhere(text: str, at: int, to: int, rng: random.Random) -> str:
    found = list(NAME.finditer(text))
    one, other = _some(found, at), _some(found, to)
    return re.sub(rf"\b{one.group()}\b", other.group(), text) if one and other else text


def _number_replace(text: str, at: int, to: int, rng: random.Random) -> str:
    token = _some(list(NUMBER.finditer(text)), at)
    return _replaced(text, token, rng.choice(NUMBERS)) if token else text


def _line_delete(text: str, at: int, to: int, rng: random.Random) -> str:
    lines = text.split("\n")
    del lines[len(lines) * at // 10**6]
    return "\n".join(lines)


def _line_double(text: str, at: int, to: int, rng: random.Random) -> str:
    lines = text.split("\n")
    n = len(lines) * at // 10**6
    return "\n".join([*lines[: n + 1], *lines[n:]])


def _line_move(text: str, at: int, to: int, rng: random.Random) -> str:
    lines = text.split("\n")
    line = lines.pop(len(lines) * at // 10**6)
    lines.insert(len(lines) * to // 10**6, line)
    return "\n".join(lines)


def _shuffle(text: str, at: int, to: int, rng: random.Random) -> str:
    lines = text.split("\n")
    rng.shuffle(lines)
    return "\n".join(lines)


# -- bulk ------------------------------------------------------------------------------------------


BRACKETS = [
    ("(", ")"),
    ("[", "]"),
    ("{", "}"),
    ("-", ""),
    ("not ", ""),
    ("if d then ", " else 1"),
    ("f(", ")"),
    ("x[", "]"),
    ("if d {", "}"),
    ("1 + ", ""),
    ("2 ^ ", ""),
    ("a * (", ")"),
]


def _nest(text: str, at: int, to: int, rng: random.Random) -> str:
    i = _at(text, at)
    opens, closes = rng.choice(BRACKETS)
    depth = rng.choice([20, 59, 120, 400, 3000])
    return text[:i] + opens * depth + " 1 " + closes * depth + text[i:]


def _many(text: str, at: int, to: int, rng: random.Random) -> str:
    """Constants, indices or conditions that build on each other."""
    number = rng.choice([5, 40, 200])
    line, first = rng.choice(
        [
            ("const q{n} = q{m} + q{m}\n", "const q0 = 1\n"),
            ("const q{n} = q{m} * q{m}\n", "const q0 = 3\n"),
            ("const q{m} = q{n}\n", f"const q{number} = 1\n"),
            ("index i{n} : size(i{m}) * 2\n", "index i0 : 2\n"),
            ("const fn g{n}(x) = g{m}(x) + g{m}(x)\n", "const fn g0(x) = x\nconst q0 = g4(1)\n"),
            ("block C{n}[d] {{ use c = C{m}[d] def (x[d]) -> y[d] {{ y[d] = c(x[d]) }} }}\n", ""),
            ("fn h{n}(x) -> y {{ y = h{m}(x) + h{m}(x) }}\n", "fn h0(x) -> y { y = x }\n"),
            ("dims p{n} of p{m} {{ hidden = {n} }}\n", "dims p0 { hidden = 8 }\n"),
        ]
    )
    lines = "".join(line.format(n=n, m=n - 1) for n in range(1, number))
    i = text.find("\n", _at(text, at)) + 1
    return text[:i] + first + lines + text[i:]


def _long_line(text: str, at: int, to: int, rng: random.Random) -> str:
    return text.replace("\n", rng.choice([" ", "\r", "\t", "\x0b", "\u2028"]))


def _nul(data: bytes, at: int, to: int, rng: random.Random) -> bytes:
    i = _at(data, at)
    return data[:i] + b"\0" * rng.choice([1, 2, 100]) + data[i:]


def _byte(data: bytes, at: int, to: int, rng: random.Random) -> bytes:
    i = _at(data, at)
    return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]


def _noise(data: bytes, at: int, to: int, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([1, 10, 300]))


def _encoding(data: bytes, at: int, to: int, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    codecs = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037", "utf-7", "latin-1"]
    return text.encode(rng.choice(codecs), "replace")


TEXT: dict[str, Operation] = {
    f.__name__.strip("_"): f
    for f in (
        _delete, _insert, _swap, _truncate, _behead, _double, _move, _token_delete, _token_replace,
        _token_insert, _token_swap, _name_replace, _name_everywhere, _number_replace, _line_delete,
        _line_double, _line_move, _shuffle, _nest, _many, _long_line,
    )
}  # fmt: skip
BYTES = {f.__name__.strip("_"): f for f in (_nul, _byte, _noise, _encoding)}
# What leaves most of a file in order finds the most, so it is done the most.
GENTLE = [
    "token_delete", "token_replace", "token_insert", "token_swap", "name_replace",
    "name_everywhere", "number_replace", "line_delete", "line_double", "line_move", "delete",
]  # fmt: skip
KINDS = [*TEXT, *BYTES, *GENTLE, *GENTLE]
