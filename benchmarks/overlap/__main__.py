"""How much of the communication is hidden, over a link whose rate is limited.

    sudo python benchmarks/overlap [--rounds N] [--json]

Two ranks, one thread each, in two network namespaces. The link's rate is chosen so that a step
communicates about as long as it computes, by a plan with what `dslc calibrate` measures here. Both
programs, `overlap none` and `overlap two_microbatches`, are loaded by the same processes and run in
turn; times are medians. The bound is max(computing, communicating) of the sequential runs: what no
order can beat. Hidden is (sequential - overlapped) / (sequential - bound). The plan's times beside
them are made with calibrated figures alone, the link's included. Linux, root.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from hosts import ADDRESS, NoHosts, hosts, limit  # noqa: E402

from compiler.planning.plan import make  # noqa: E402
from dslc.commands.calibrate import written  # noqa: E402
from dslc.planning.measure import Found, machine  # noqa: E402
from dslc.program import compile_file  # noqa: E402

DIMS = {
    "hidden": 1024, "vocab": 1024, "layers": 11, "dense": 1, "ffn": 1024, "heads": 32,
    "q_rank": 1024, "kv_rank": 128, "nope": 64, "rope": 32, "value": 64, "experts": 16,
    "groups": 4, "open_groups": 4, "per_token": 4, "expert_ffn": 1024,
}  # fmt: skip
PROMPT, SEQUENCES = 96, 4  # of each rank
DEPLOYMENTS = """
edition 2026
import dsv3
import here

deploy sequential of DeepSeekV3 from ep2 on here {{
  serve prefill prompt = {prompt} "chosen", tokens_per_rank = {tokens} "chosen", cache_hits = 0
}}
deploy overlapped of DeepSeekV3 from sequential on here {{ overlap two_microbatches }}
deploy planned_sequential of DeepSeekV3 from sequential on here {{ precision f32 for act }}
deploy planned_overlapped of DeepSeekV3 from overlapped on here {{ precision f32 for act }}
"""
NAMES = ("sequential", "overlapped")


@dataclass(frozen=True)
class Result:
    """Seconds of a step; ``bound`` is what no order can beat, ``hidden`` the share that is of what
    could be; ``error`` of the plan, signed; ``difference`` of the logits, relative."""

    sequential: float
    overlapped: float
    computing: float
    communicating: float
    bound: float
    hidden: float
    planned_sequential: float
    planned_overlapped: float
    error_sequential: float
    error_overlapped: float
    link_bytes_per_second: float
    difference: float


def with_link(found: list[Found], rate: float, latency: float) -> list[Found]:
    """Figures of this machine's computing in f32, over this link."""
    kept = [f for f in found if "scale_up" not in f.name and "bf16" not in f.name]
    how = "all-to-all of 2 processes over gloo, between the namespaces"
    link = [Found("peak[scale_up]", rate, how), Found("latency[scale_up]", latency, how)]
    return [*kept, *link]


def source(folder: Path, found: list[Found]) -> Path:
    """The deployments, on a cluster with these figures."""
    (folder / "here.arch").write_text(written("CPU", found, "cpu", 2))
    file = folder / "overlap.arch"
    file.write_text(DEPLOYMENTS.format(prompt=PROMPT, tokens=PROMPT * SEQUENCES))
    return file


def planned(file: Path, name: str):
    """The plan of a deployment."""
    program = compile_file(str(file), set=DIMS)
    deployment = program.deployment(f"planned_{name}")
    return make(program.after("elaborate"), program.after(), deployment, weigh=False)


def run(rounds: int, folder: Path) -> Result:
    _, found = machine("cpu", 2)
    local = {f.name: f.value for f in found}
    # At any rate, the plan says how many bytes go and how long is computed.
    guess = 1e8
    file = source(folder, with_link(found, guess, local["latency[scale_up]"]))
    schedule = planned(file, "sequential").serving.schedule
    sends = sum(1 for t in planned(file, "sequential").serving.tasks if t.stream == "communicate")
    alone = schedule.communicating - sends * local["latency[scale_up]"]
    rate = guess * alone / schedule.computing
    with hosts() as names:
        limit(names, rate)
        source(folder, with_link(found, rate, local["latency[scale_up]"]))
        for name in NAMES:
            compile_file(str(file), set=DIMS, deploy=name).save(folder / name)
        ranks = [launched(host, n, folder, rounds) for n, host in enumerate(names)]
        for rank in ranks:
            if rank.wait(timeout=600):
                sys.exit("a rank failed")
    measured = [json.loads((folder / f"rank{n}.json").read_text()) for n in range(2)]
    link = measured[0]["link"]
    file = source(folder, with_link(found, link["rate"], link["latency"]))
    plans = {name: planned(file, name).serving.seconds for name in NAMES}
    sequential, overlapped = (max(m[name] for m in measured) for name in NAMES)
    # A rank that is early waits in its collectives for the other: who waits least, sends.
    communicating = min(m["communication"] for m in measured)
    computing = max(m["sequential"] - m["communication"] for m in measured)
    bound = max(computing, communicating)
    return Result(
        sequential,
        overlapped,
        computing,
        communicating,
        bound,
        (sequential - overlapped) / (sequential - bound),
        plans["sequential"],
        plans["overlapped"],
        plans["sequential"] / sequential - 1,
        plans["overlapped"] / overlapped - 1,
        link["rate"],
        max(m["error"] for m in measured),
    )


def launched(host: str, number: int, folder: Path, rounds: int) -> subprocess.Popen[bytes]:
    given = {
        "vocab": DIMS["vocab"], "batch": 2 * SEQUENCES, "prompt": PROMPT, "rounds": rounds,
    }  # fmt: skip
    environment = dict(
        os.environ, RANK=str(number), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT="29400",
        MASTER_ADDR=ADDRESS.format(1), GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    script = str(Path(__file__).parent / "rank.py")
    command = ["ip", "netns", "exec", host, sys.executable, script, str(folder), json.dumps(given)]
    return subprocess.Popen(command, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = run(options.rounds, Path(folder))
        except NoHosts as error:
            sys.exit(f"skipped: {error}")
    if options.json:
        print(json.dumps(asdict(result)))
        return
    r = replace(result)
    print(
        f"link {r.link_bytes_per_second * 8 / 1e6:.0f} Mbit/s, logits differ by {r.difference:.0e}"
    )
    print(f"{'':14}{'measured':>10}{'planned':>10}{'error':>8}")
    for name in NAMES:
        own, plan = getattr(r, name), getattr(r, f"planned_{name}")
        print(f"{name:14}{own * 1e3:8.0f} ms{plan * 1e3:7.0f} ms{(plan / own - 1) * 100:+7.0f}%")
    for name in ("computing", "communicating", "bound"):
        print(f"{name:14}{getattr(r, name) * 1e3:8.0f} ms")
    print(f"{'hidden':14}{r.hidden * 100:8.0f} %")


if __name__ == "__main__":
    main()
