"""shard: one program for all ranks of a deployment's mesh, from what its rules place.

The rules place indices and arrays of blocks; everything else follows. A body is gone through node
by node with the types that its arguments have on one rank, and each op's rule
(``compiler/passes/placing_rules.py``) says what its result is then and what must be sent. Dims that
are divided have a rank's part in types (``h/tp``), so that each rank's program is an ordinary one,
with smaller sizes: ``heads / ranks.tp``. How many ranks there are is a constant like any other:
neither the program nor the time to make it grows with them.

Sequences are spread over the axes ``batch`` by the backend, as it lifts bodies over sequences.
A value that depends on a token is therefore divided over them and has no further dim that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from compiler import spec_collectives as spec_collectives  # registers the ops
from compiler.collectives import divided
from compiler.ir import Child, Dim, Graph, Module, Program, Type
from compiler.passes.placing import Placed, Placer
from dsl.deploy.check import SHARED_STATE
from dsl.deploy.placed import PlacedBlock, PlacedUse

Key = tuple[str, PlacedBlock]


def run(program: Program) -> Program:
    """The program of each rank, if the program's deployment has a mesh.

    Raises:
        NotBuilt: a rule asks for what this pass cannot do.
    """
    deployment = program.deployment
    if deployment is None or program.placed is None:
        return program
    if not any(rule.axes and rule.target.kind not in SHARED_STATE for rule in deployment.shard):
        return program
    return Sharder(program, program.placed, deployment.mesh.sizes, deployment.batch_axes).run()


class Sharder:
    """Makes modules and bodies on demand: each once for each way in which it is placed."""

    def __init__(
        self, program: Program, placed: PlacedBlock, mesh: Mapping[str, int], batch: tuple[str, ...]
    ):
        self.program = program
        self.batch = batch
        self.mesh = dict(mesh)
        self.modules: dict[str, Module] = {}
        self.bodies: dict[str, Graph] = {}
        self._named: dict[Key, str] = {}
        self._olds: dict[str, tuple[Module, PlacedBlock]] = {}  # by the new module's name
        self._methods: dict[str, dict[str, str]] = {}
        self._made: dict[object, tuple[str, Placed]] = {}
        self.root = self.module(program.root, placed)

    def run(self) -> Program:
        entries = {}
        for entry in self.program.entries.values():
            types = [node.type for node in self.program.bodies[entry.body].inputs]
            body, _ = self.body(entry.body, self.root, types, plain=True)
            entries[entry.name] = replace(entry, body=body)
        for name, module in self.modules.items():
            self.modules[name] = replace(module, methods=self._methods.get(name, {}))
        ranks = {f"ranks.{axis}": size for axis, size in self.mesh.items()}
        return replace(
            self.program,
            constants={**self.program.constants, **ranks},
            root=self.root,
            modules=self.modules,
            bodies=self.bodies,
            entries=entries,
            mesh=tuple(self.mesh),
            batch=self.batch,
        )

    # -- modules ---------------------------------------------------------------------------------

    def module(self, old: str, placed: PlacedBlock) -> str:
        """The name of a module with these placements, which is made if it is not there."""
        key = (old, placed)
        if key not in self._named:
            name, number = old, 1
            while name in self._olds or (name != old and name in self.program.modules):
                name, number = f"{old}.{number}", number + 1
            self._named[key] = name
            module = self.program.modules[old]
            self._olds[name] = (module, placed)
            children = []
            for child, use in zip(module.children, placed.uses, strict=True):
                inner = self.module(child.module, use.block)
                children.append(replace(child, module=inner, array=_array(child, use)))
            parameters = tuple(
                replace(p, type=self.stored(p.type, placed)) for p in module.parameters
            )
            self.modules[name] = replace(
                module, name=name, parameters=parameters, children=tuple(children), methods={}
            )
        return self._named[key]

    def stored(self, type: Type, placed: PlacedBlock) -> Type:
        """A parameter's type on one rank."""
        return replace(type, dims=tuple(_stored(dim, placed) for dim in type.dims))

    def use(self, module: str, child: str, over: Dim | None) -> tuple[str, PlacedUse]:
        """The module, with its placements, of a child; ``over`` tells apart the pieces of an array.

        Args:
            over: the dim of the loop, or of the picks, as it was before this pass.
        """
        old, placed = self._olds[module]
        found = []
        for own, use in zip(old.children, placed.uses, strict=True):
            if own.name != child:
                continue
            if own.array is None or over is None:
                if own.array is over:
                    found.append((own, use))
            elif (own.array.start, own.array.size) == (over.start, over.size):
                found.append((own, use))
        named = [f for f in found if f[0].array and over and f[0].array.name == over.name]
        own, use = (named or found)[0]
        return self.module(own.module, use.block), use

    # -- bodies ----------------------------------------------------------------------------------

    def body(
        self, old: str, module: str, types: Iterable[Type], plain: bool = False
    ) -> tuple[str, Placed]:
        """A body in a module, for arguments of these types on one rank; and what it gives.

        Args:
            plain: the result is to be whole on every rank.
        """
        types = tuple(types)
        key = (old, module, types, plain)
        if key not in self._made:
            owner = self._olds[module][0].name
            stem = f"{module}{old.removeprefix(owner)}" if old.startswith(f"{owner}.") else old
            name, number = stem, 1
            while name in self.bodies:
                name, number = f"{stem}.{number}", number + 1
            self.bodies[name] = Graph(name)  # claims the name
            placer = Placer(self, module, self.program.bodies[old], name)
            graph, result = placer.run(types, plain)
            del self.bodies[name]  # bodies that it runs come first
            self.bodies[name] = graph
            self._made[key] = (name, result)
            labels = [k for k, b in self._olds[module][0].methods.items() if b == old]
            methods = self._methods.setdefault(module, {})
            for label in labels:
                while label in methods:
                    label += "'"
                methods[label] = name
        return self._made[key]


def _array(child: Child, use: PlacedUse) -> Dim | None:
    return divided(child.array, use.axes, use.redundant) if child.array is not None else None


def _stored(dim: Dim, placed: PlacedBlock) -> Dim:
    """A stored dim on one rank: divided itself, or in its parts."""
    if not dim.parts:
        return divided(dim, placed.of(dim.name))
    parts = [_stored(part, placed) for part in dim.parts]
    return Dim.sum(parts) if dim.form == "sum" else Dim.product(parts)
