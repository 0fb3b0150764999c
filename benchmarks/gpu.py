"""``make gpu``: the kernels' tests on the GPU, then how fast they are; in parts of 8 minutes.

What a part has done is kept (tests in ``build/gpu``, timings in ``benchmarks/results``), so that
the same command goes on where the last one stopped, within a file of tests too. Without a GPU it
says so and ends well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PASSED = "DSLC_PASSED"  # benchmarks/resume.py reads it
PART = 8 * 60  # seconds
LEAST = 30  # seconds left that are worth starting something
TESTS = ("tests/kernels/test_*.py", "tests/sharded/test_nccl.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=int, default=PART, help="of this part (%(default)s)")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    from dslc.bench.gpu.machine import absent

    reason = absent()
    if reason is not None:
        print(f"make gpu: skipped: {reason}", file=sys.stderr)
        return 0
    kept = ROOT / "build" / "gpu" / "tests.json"
    outcomes = read(kept)
    passed_tests = kept.with_name(f"passed-{digest()[:16]}.txt")
    files = [
        path.relative_to(ROOT).as_posix() for each in TESTS for path in sorted(ROOT.glob(each))
    ]
    for name in files:
        left = end - time.monotonic()
        if outcomes.get(name) == "passed" or left < LEAST:
            continue
        outcomes[name] = test(name, left, passed_tests)
        write(kept, outcomes)
        print(f"make gpu: {name}: {outcomes[name]}", flush=True)
    failed = [name for name in files if outcomes.get(name) == "failed"]
    passed = sum(outcomes.get(name) == "passed" for name in files)
    waiting = len(files) - passed - len(failed)
    status = 0
    if not waiting and end - time.monotonic() >= LEAST:
        status = bench(end - time.monotonic())
    print(f"make gpu: {passed} of {len(files)} files of tests passed, {len(failed)} failed")
    if waiting:
        print(f"make gpu: {waiting} are left, and the timings: the same command goes on")
    return 1 if failed else status


def test(name: str, seconds: float, passed: Path) -> str:
    """Run what is left of a file of tests on the GPU: passed, failed, or stopped as time ran out.

    Args:
        passed: the file that lists tests which passed before.
    """
    passed.parent.mkdir(parents=True, exist_ok=True)
    resuming = ["-p", "no:cacheprovider", "-p", "benchmarks.resume"]
    command = [sys.executable, "-m", "pytest", "-q", *resuming, name]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    environment[PASSED] = str(passed)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "stopped"
    no_tests = 5
    return "passed" if done.returncode in (0, no_tests) else "failed"


def bench(seconds: float) -> int:
    command = [sys.executable, "-m", "dslc", "bench", "--kernels", "--seconds", str(int(seconds))]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def read(kept: Path) -> dict[str, str]:
    """What the tests of just this tree, and of these versions, came to."""
    try:
        data = json.loads(kept.read_text())
        return dict(data["outcomes"]) if data["of"] == digest() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(kept: Path, outcomes: dict[str, str]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"of": digest(), "outcomes": outcomes}, indent=1) + "\n")


def digest() -> str:
    from dslc.bench.gpu.machine import versions

    found = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for folder in ("backends", "tests/kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
