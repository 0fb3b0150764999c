"""A rank that loads a checkpoint large enough to see what it takes."""

import json
import sys
from pathlib import Path

import dslc

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))


def rank(folder: Path, name: str, number: int) -> None:
    from rank_memory import measured

    # Once before, so that what a process needs once (libraries, connections) is there.
    dslc.load(folder / "small", checkpoint=folder / "small-checkpoint")
    found = measured(str(folder / name), str(folder / "checkpoint"))
    (folder / f"{name}.{number}.json").write_text(json.dumps(found))
