"""Pipeline stages and schedules: that every layer stands in exactly one stage, and what a schedule
needs."""

from __future__ import annotations

from collections.abc import Mapping

from dsl.deploy import syntax as written
from dsl.deploy.clauses import Values
from dsl.deploy.names import Anatomy
from dsl.deploy.typed import Mesh, Overlap, Stage, Stages, Train
from dsl.diagnostics import Diagnostics, Span, near
from dsl.tables import count

PIPELINES = ("1f1b", "zb1p", "dualpipe")
SCHEDULES = ("none", "two_microbatches", *PIPELINES)
MOST_STAGES = 4096

Ranges = Mapping[str, tuple[int, int]]  # a chained array of the model -> its first and last layer


class StageMaker:
    """Reads one ``stages`` clause against the arrays of blocks that the model chains."""

    def __init__(
        self, clause: written.Stages, anatomy: Anatomy, values: Values, found: Diagnostics
    ):
        self.clause = clause
        self.anatomy = anatomy
        self.values = values
        self.found = found
        self.problems = values.problems
        self.items = [i for i in clause.items if isinstance(i, written.StageLayers)]
        self.extras = [i for i in clause.items if isinstance(i, written.StageWith)]

    def check_names(self) -> bool:
        """Whether everything named exists."""
        names, right = self.anatomy.own.names, True
        chained = [n for n, (kind, _) in names.items() if n in self.anatomy.own.chained]
        for item in self.items:
            if item.name.text not in chained:
                right = False
                self._unknown(item, "chains no array of blocks called", chained)
        known = [n for n, (kind, _) in names.items() if kind in ("def", "use")]
        for extra in self.extras:
            if extra.name.text not in known:
                right = False
                self._unknown(extra, "has no entry point or use called", known)
            if extra.where.text not in ("first", "last"):
                right = False
                self.found.error("E0817", "a place is the first or the last", extra.where.span)
        return right

    def _unknown(
        self, item: written.StageLayers | written.StageWith, says: str, known: list[str]
    ) -> None:
        if item.name.text not in self.anatomy.broken:
            model = self.anatomy.model.name.text
            self.found.error(
                "E0811",
                f"'{model}' {says} '{item.name.text}'",
                item.name.span,
                hint=near(item.name.text, known) or (f"it has {', '.join(known)}" if known else ""),
            )

    def make(self, mesh: Mesh, ranges: Ranges) -> Stages | None:
        """The stages at the present sizes; None after a diagnostic."""
        ways = mesh.sizes.get(self.clause.axis.text)
        if ways is None:
            return None  # reported with the other axes
        stages: list[Stage] = []
        held: dict[str, list[tuple[int, int, Span]]] = {name: [] for name in ranges}
        for item in self.items:
            layers = self._layers(item, ranges[item.name.text], ways)
            if layers is None:
                return None
            start, counts = layers
            held[item.name.text].append((start, start + sum(counts), item.span))
            for number in counts:
                stages.append(Stage(((item.name.text, start, start + number),)))
                start += number
        if not all(self._once(name, ranges[name], parts) for name, parts in held.items()):
            return None
        if not stages or len(stages) % ways:
            self.problems.error(
                "E0817",
                f"these are {len(stages)} stages, and '{self.clause.axis.text}' has {ways} ranks",
                self.clause.span,
                hint="as many stages as ranks, or a whole multiple of them",
            )
            return None
        for extra in self.extras:
            at = 0 if extra.where.text == "first" else -1
            stages[at] = Stage(stages[at].layers, (*stages[at].extras, extra.name.text))
        return Stages(self.clause.axis.text, tuple(stages), self.clause.span)

    def _layers(
        self, item: written.StageLayers, whole: tuple[int, int], ways: int
    ) -> tuple[int, list[int]] | None:
        """The first layer of an item and how many each of its stages holds."""
        start, stop = whole
        if item.start is not None and item.stop is not None:
            given = [self.values.count(e, 0, 1 << 20, "a layer") for e in (item.start, item.stop)]
            if given[0] is None or given[1] is None:
                return None
            start, stop = given[0], given[1]
        if not item.parts:
            if (stop - start) % ways:
                even, more = divmod(stop - start, ways)
                hint = f"say how: as ({even + 1} x {more}, {even} x {ways - more})"
                self._wrong(f"{stop - start} layers do not divide by {ways} ranks", item.span, hint)
                return None
            return start, [(stop - start) // ways] * ways
        counts: list[int] = []
        for part in item.parts:
            layers, times = self._part(part)
            if layers is None or times is None or len(counts) + times > MOST_STAGES:
                if layers is not None and times is not None:
                    self._wrong(f"more than {MOST_STAGES} stages", part.span)
                return None
            counts += [layers] * times
        if sum(counts) != stop - start:
            self._wrong(
                f"these stages hold {sum(counts)} layers, and {start} .. {stop} are {stop - start}",
                item.span,
                "4 x 15 is 15 stages of 4 layers each",
            )
            return None
        return start, counts

    def _part(self, part: written.TileSize | object) -> tuple[int | None, int | None]:
        if isinstance(part, written.TileSize):
            sides = [
                count(side, 0, 1 << 20, "a stage's layers", part.span, self.problems)
                for side in (part.rows, part.columns)
            ]
            return sides[0], sides[1]
        return self.values.count(part, 0, 1 << 20, "a stage's layers"), 1  # type: ignore[arg-type]

    def _once(self, name: str, whole: tuple[int, int], parts: list[tuple[int, int, Span]]) -> bool:
        """Whether the parts cover an array exactly once."""
        at, before = whole[0], None
        for start, stop, span in sorted(parts, key=lambda p: p[:2]):
            if start > at:
                self._wrong(f"layers {at} .. {start} of '{name}' stand in no stage", span)
                return False
            if start < at:
                if before is None:
                    self._wrong(f"'{name}' starts at layer {whole[0]}", span)
                else:
                    self._wrong(
                        f"layer {start} of '{name}' stands in two stages", span, note=before
                    )
                return False
            at, before = stop, span
        if at == whole[1]:
            return True
        span = parts[-1][2] if parts else self.clause.span
        if at < whole[1]:
            self._wrong(f"layers {at} .. {whole[1]} of '{name}' stand in no stage", span)
        else:
            hint = f"at these sizes '{name}' has layers {whole[0]} .. {whole[1]}; "
            hint += "another preset may be meant"
            self._wrong(f"'{name}' ends before layer {whole[1]}", span, hint)
        return False

    def _wrong(self, message: str, span: Span, hint: str = "", note: Span | None = None) -> None:
        notes = [(note, "the first one is here")]
        self.problems.error("E0817", message, span, notes=notes, hint=hint)


def overlap(clause: written.Overlap | None, has_stages: bool, found: Diagnostics) -> Overlap | None:
    """The schedule; None after a diagnostic. A pipeline runs 1F1B where nothing is said."""
    if clause is None:
        return Overlap("1f1b" if has_stages else "none", None, None)
    name = clause.schedule.text
    if name not in SCHEDULES:
        found.error(
            "E0818",
            f"no schedule is called '{name}'",
            clause.schedule.span,
            hint=near(name, SCHEDULES) or f"schedules are {', '.join(SCHEDULES)}",
        )
        return None
    sms: int | None = None
    for option in clause.options:
        if option.name.text != "sms" or option.keys:
            found.error(
                "E0803",
                f"'overlap' has no setting '{option.name.text}'",
                option.name.span,
                hint="overlap dualpipe(sms = 20)",
            )
            return None
        value = getattr(option.value, "value", None)
        sms = count(value, 0, 4096, "sms", option.span, found)
    return Overlap(name, sms, clause.span)


def check_schedule(
    chosen: Overlap,
    stages: Stages | None,
    train: Train | None,
    ranks: int,
    micro_batches: int | None,
    problems: Diagnostics,
) -> None:
    """What a schedule needs of the deployment that it is chosen for."""
    name, span = chosen.schedule, chosen.span
    if span is None or name not in PIPELINES:
        return
    if stages is None or train is None:
        lacks = "stages" if stages is None else "train"
        problems.error(
            "E0818",
            f"'{name}' is a schedule of a training pipeline, and this deployment has no '{lacks}'",
            span,
            hint="inference hides communication with: overlap two_microbatches",
        )
        return
    if name != "dualpipe":
        return
    if len(stages.stages) != ranks or ranks % 2:
        problems.error(
            "E0818",
            f"'dualpipe' runs one stage per rank on an even number of ranks, not"
            f" {len(stages.stages)} on {ranks}",
            span,
            notes=[(stages.span, "the stages are here")],
        )
    elif micro_batches is not None and (micro_batches % 2 or micro_batches < 2 * ranks):
        problems.error(
            "E0818",
            f"'dualpipe' takes an even number of micro-batches, at least {2 * ranks} for {ranks}"
            f" ranks, not {micro_batches}",
            span,
            notes=[(train.span, "batch and micro_batch are given here")],
        )
