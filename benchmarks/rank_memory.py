"""What each rank of a deployment reads of a checkpoint, and the memory that loading it takes.

    python benchmarks/rank_memory.py [--deploy NAME] [--layers N] [--json]

Writes a random checkpoint with `dslc init` (in the temporary folder, removed at the end), compiles
the deployment, loads it in as many processes as it has ranks, and prints, for each: bytes read of
the files (counted where they are read), bytes of weights held, and the peak of RssAnon above what
the process had before (sampled every two milliseconds). Beside them, what an even share of the
arrays of blocks and everything else together would be. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from load_memory import Sampler, dslc_command, environment


def measured(compiled: str, checkpoint: str, dtype: str | None = None) -> dict[str, int]:
    """Load in this process, a rank of several."""
    import backends.pytorch.load  # noqa: F401  what a process needs whatever it loads
    import dslc

    with Sampler() as sampler:
        model = dslc.load(compiled, checkpoint, dtype=dtype)
    weights = model.module.state_dict().values()
    return {
        "read": model.bytes_read,
        "held": sum(t.nbytes for t in weights),
        "largest_tensor": max(t.nbytes for t in weights),
        "peak": sampler.peak[0],
    }


def stored(checkpoint: Path, array: str = ".experts.") -> tuple[int, int]:
    """Bytes of a checkpoint's arrays of blocks, and of everything else."""
    from backends.pytorch.weights.checkpoint import open_checkpoint

    tensors = open_checkpoint(checkpoint).tensors.items()
    blocks = sum(t.size for name, t in tensors if array in name)
    return blocks, sum(t.size for _, t in tensors) - blocks


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what ranks read and hold.")
    parser.add_argument("--deploy", default="ep4", help="of dsv3 (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of dsv3's preset m813 (%(default)s)")
    parser.add_argument("--set", action="append", default=[], help="as of dslc init")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        compiled, checkpoint, out = options.rank
        found = measured(compiled, checkpoint)
        Path(out, os.environ["RANK"]).write_text(json.dumps(found))
        return
    sizes = ["--dims", "m813", "--set", f"layers={options.layers}"]
    sizes += [part for setting in options.set for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, compiled, out = (Path(folder, n) for n in ("checkpoint", "compiled", "out"))
        out.mkdir()
        dslc_command("init", str(checkpoint), "dsv3", *sizes)
        sizes = ["--checkpoint", str(checkpoint), "--deploy", options.deploy]
        dslc_command("compile", "dsv3", *sizes, "-o", str(compiled))
        mesh = json.loads((compiled / "manifest.json").read_text())["mesh"]
        count = 1
        for size in mesh.values():
            count *= size
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={count}", __file__, "--rank"]
        subprocess.run(
            [*launcher, str(compiled), str(checkpoint), str(out)], check=True, env=environment()
        )
        ranks = [json.loads((out / str(n)).read_text()) for n in range(count)]
        blocks, rest = stored(checkpoint)
    ways = mesh.get("ep", 1)
    if options.json:
        print(json.dumps({"mesh": mesh, "blocks": blocks, "rest": rest, "ranks": ranks}))
        return
    print(
        f"checkpoint of {(blocks + rest) / 1e6:,.1f} MB: experts {blocks / 1e6:,.1f} MB, the rest "
        f"{rest / 1e6:,.1f} MB; 1/{ways} of the experts and the rest are "
        f"{(blocks / ways + rest) / 1e6:,.1f} MB"
    )
    print(f"{'rank':>4} {'MB read':>10} {'MB held':>10} {'largest':>10} {'peak MB':>10}")
    for number, row in enumerate(ranks):
        told = (f"{row[key] / 1e6:>10,.1f}" for key in ("read", "held", "largest_tensor", "peak"))
        print(f"{number:>4} {' '.join(told)}")


if __name__ == "__main__":
    main()
