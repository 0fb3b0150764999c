"""A contestant's process: makes it, then answers one line of JSON for each line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backends.pytorch.memory import keep_freed
from compiler.errors import UserError
from dslc.bench.contestants import Absent, Setup, maker


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    keep_freed()  # as `dslc run` does; the others are given it too
    name, asked = json.loads(sys.stdin.readline())
    for key in ("directory", "checkpoint", "scratch"):
        asked[key] = Path(asked[key]) if asked[key] is not None else None
    try:
        contestant = maker(name)(Setup(**asked))
    except (Absent, UserError) as reason:
        answer(absent=str(reason))
        return
    answer(about=contestant.about)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            answer(**asdict(contestant.round(**json.loads(line))))


if __name__ == "__main__":
    main()
