"""Which number format each contraction runs in, and each value is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compiler import spec
from compiler.ir import Program
from compiler.precision import weights_of
from compiler.tensors import VIEWS, places
from dsl.deploy.typed import Deployment, Stored
from dsl.formats import NumberFormat, Tile

HALF = 2.0  # bytes of the model's own type where nothing is said: bfloat16
WIDTHS = {"act": HALF, "f32": 4.0, "i64": 8.0, "bool": 1.0}


def width(format: NumberFormat, tile: Tile | None = None) -> float:
    """Bytes of an element, its share of the scale included. A side of a tile that is as long as
    the matrix makes scales that count for nothing."""
    bytes = format.bits / 8
    tile = tile or format.tile
    if format.scale is not None and tile is not None and tile.rows and tile.columns:
        bytes += width(format.scale) / (tile.rows * tile.columns)
    return bytes


@dataclass(frozen=True)
class Role:
    """How an operand is stored. ``name`` None: as the model's own type."""

    format: NumberFormat | None
    bytes: float
    turns: bool = False  # its tiles are not square: summed over rows it is quantised anew

    @staticmethod
    def of(stored: Stored | None, own: float) -> Role:
        if stored is None or stored.format is None:
            return Role(None, own)
        tile = stored.tile or stored.format.tile
        turns = tile is not None and tile.rows != tile.columns
        return Role(stored.format, width(stored.format, stored.tile), turns)


@dataclass(frozen=True)
class Product:
    """The formats of a contraction with a parameter."""

    weights: Role
    activations: Role
    gradients: Role

    @property
    def format(self) -> NumberFormat | None:
        """What the product is computed in: both operands' format, or the model's own type."""
        same = self.weights.format == self.activations.format
        return self.weights.format if same else None


class Precision:
    """A deployment's precision rules, on one program.

    Attributes:
        own: bytes of a value of the model's own type; ``cached``: of a value kept between steps.
    """

    def __init__(self, source: Program, final: Program, deployment: Deployment):
        """
        Args:
            source: as elaborated: rules speak of the source's contractions.
            final: after the last pass; what it takes apart is not quantised unless one trains.
        """
        own, cached = HALF, None
        self.own_format: tuple[str, ...] = ("bf16",)
        for rule in deployment.precision:
            stored = rule.roles.get("values")
            if rule.selects == "act" and stored is not None and stored.format is not None:
                own = width(stored.format, stored.tile)
                self.own_format = (stored.format.name, *stored.format.bases)
            elif rule.selects == "cached" and stored is not None:
                cached = Role.of(stored, own).bytes
        self.own, self.cached = own, own if cached is None else cached
        self.plain = Product(*[Role(None, own)] * 3)
        self.products: dict[tuple[str, tuple[range, ...]], Product] = {}
        apart = set() if deployment.train is not None else _taken_apart(source, final)
        for rule in deployment.precision:
            roles = rule.roles
            if "weights" not in roles and "activations" not in roles:
                continue
            activations = Role.of(roles.get("activations"), own)
            gradients = Role.of(roles["gradients"], own) if "gradients" in roles else activations
            product = Product(Role.of(roles.get("weights"), own), activations, gradients)
            for key in weights_of(source, rule):
                self.products[key] = self.plain if key in apart else product

    def of(self, path: str, ranges: tuple[range, ...]) -> Product:
        """The formats of the contractions with a parameter, by path and ranges of its pattern."""
        return self.products.get((path, ranges), self.plain)

    def value(self, dtype: str) -> float:
        """Bytes of an element that is stored as it is computed."""
        return self.own if dtype == "act" else WIDTHS[dtype]


def _taken_apart(source: Program, final: Program) -> set[tuple[str, tuple[range, ...]]]:
    """Parameters that some program contracts over other indices than the source does: they keep
    the model's own type everywhere, so that prefill and decoding compute the same."""
    before, after = _sums(source), _sums(final)
    names = {key for key, sums in after.items() if sums - before.get(key, sums)}
    return {
        (f"{place.path}.{name}".lstrip("."), place.ranges)
        for place in places(final)
        for module, name in names
        if place.module.name == module
    }


def _sums(program: Program) -> Mapping[tuple[str, str], set[frozenset[str]]]:
    """By module and parameter, the sets of indices that are summed in products with it."""
    found: dict[tuple[str, str], set[frozenset[str]]] = {}
    for scope, graph in spec.scopes(program):
        roots: dict[str, str] = {}
        for node in graph:
            if node.op == "param":
                roots[node.name] = str(node.attrs["param"])
            elif node.op in VIEWS and node.inputs[0] in roots:
                roots[node.name] = roots[node.inputs[0]]
            elif node.op == "contract" and node.attrs["over"]:
                for operand in node.inputs:
                    if operand in roots:
                        key = (scope.module, roots[operand])
                        found.setdefault(key, set()).add(frozenset(node.attrs["over"]))
    return found
