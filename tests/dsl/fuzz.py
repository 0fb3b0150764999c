"""Thousands of damaged files: none may crash the checker or the elaborator, or keep them busy.

    python tests/dsl/fuzz.py --count 10000 --seed 1

Each damaged file is checked; those without a mistake are elaborated. Prints what was found, the
slowest file, and every crash with the seed that makes it again (``--only SEED``). The exit status
is 1 if there was a crash or a file took longer than ``--limit`` seconds of CPU time (others on the
machine do not count).
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from mutate import arbitrary, mutate, sources

from compiler.passes import elaborate
from compiler.verify import verify
from dsl.constants import Choices
from dsl.diagnostics import DiagnosticError
from dsl.program import check_file, open_program


@dataclass(frozen=True)
class Outcome:
    seed: int
    source: str
    kind: str  # mistakes, refused (by the elaborator), elaborated, library, crash, too slow
    seconds: float
    trouble: str = ""


class TooSlow(BaseException):
    pass


def damaged(seed: int) -> tuple[str, bytes]:
    """The name of a source, and what chance makes of it."""
    rng = random.Random(seed)
    names = list(SOURCES)
    # Models more often than libraries: only these are elaborated.
    name = rng.choice([n for n in names if not n.startswith("dsl/std")] * 3 + names)
    return name, mutate(SOURCES[name], arbitrary(rng))


def try_one(folder: Path, data: bytes) -> str:
    """Check a file and, if it has no mistake, elaborate it. Anything but diagnostics is raised."""
    path = folder / "damaged.arch"
    path.write_bytes(data)
    found = check_file(str(path), warnings=True)
    for diagnostic in found:
        diagnostic.render()
    if any(not d.is_warning for d in found):
        return "mistakes"
    try:
        program = open_program(str(path), Choices())
        if program.model is None:
            return "library"
        verify(elaborate.run(program), "elaborate")
    except DiagnosticError as error:
        assert error.diagnostics, "refused without a reason"
        str(error)
        return "refused"
    return "elaborated"


def outcome(seed: int) -> Outcome:
    name, data = damaged(seed)
    start = time.process_time()
    trouble = ""
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            kind = try_one(Path(folder), data)
    except TooSlow:
        kind, trouble = "too slow", traceback.format_exc(limit=-12)
    except Exception:
        kind, trouble = "crash", traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return Outcome(seed, name, kind, time.process_time() - start, trouble)


def _alarm(*_: object) -> None:
    raise TooSlow


SOURCES = sources()
LIMIT = 10.0


def main() -> int:
    global LIMIT
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    parser.add_argument("--limit", type=float, default=LIMIT, help="CPU seconds for one file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="this file alone; prints it to stdout")
    options = parser.parse_args()
    LIMIT = options.limit
    if options.only is not None:
        sys.stdout.buffer.write(damaged(options.only)[1])
        print(outcome(options.only), file=sys.stderr)
        return 0
    seeds = range(options.seed, options.seed + options.count)
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:
        found = list(pool.imap_unordered(outcome, seeds, chunksize=20))
    kinds = collections.Counter(o.kind for o in found)
    slowest = max(found, key=lambda o: o.seconds)
    print(", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    print(f"slowest: {slowest.seconds:.2f} s ({slowest.source}, --only {slowest.seed})")
    bad = [o for o in found if o.trouble]
    by_place = collections.defaultdict(list)
    for o in bad:
        by_place["\n".join(o.trouble.strip().split("\n")[-3:])].append(o)
    for same in sorted(by_place.values(), key=len, reverse=True):
        print(
            f"\n{len(same)} times, first {same[0].source} --only {same[0].seed}:\n{same[0].trouble}"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
