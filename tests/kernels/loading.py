"""A model's kernels with their binaries, on a GPU that is not there: what a driver is asked.

Run by test_loading.py in a process without TRITON_INTERPRET. A stand-in for Triton's driver keeps
what it is given to load and to launch; ``CompiledKernel`` and ``Precompiled`` are the real ones.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from backends.triton.load import _module, attach, read_index


class Driver:
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, bytes, int]] = []
        self.launched: list[tuple] = []
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def load_binary(self, name, binary, shared, device):
        self.loaded.append((name, bytes(binary), shared))
        return "module", f"function {name}", 32, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, *rest):
            own = len(source.signature)
            self.launched.append(((x, y, z), function, rest[-own:]))

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def main(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
    stand_in = Driver()
    driver.set_active(stand_in)
    module = _module(directory, files["kernels.py"], {})
    attach(module, read_index(files), files)
    name = sys.argv[2]
    x, gain = torch.ones(3, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16)
    getattr(module, name)(x, gain)
    kernel = getattr(module, f"{name}_kernel")
    found = {
        "loaded": [[n, len(binary), shared] for n, binary, shared in stand_in.loaded],
        "launched": [
            [grid, function, [a if isinstance(a, int) else list(a.shape) for a in arguments]]
            for grid, function, arguments in stand_in.launched
        ],
        "compiled": kernel.compiled,
    }
    # What no binary fits is Triton's own to compile: here that is seen, not done.
    seen = []
    kernel.function = type(
        "Own",
        (),
        {
            "arg_names": kernel.function.arg_names,
            "__getitem__": lambda self, grid: lambda *a, **o: seen.append(a[0].dtype),
        },
    )()
    getattr(module, name)(x.float(), gain)
    shifted = torch.ones(3 * 256 + 1, dtype=torch.bfloat16)[1:].view(3, 256)
    getattr(module, name)(shifted, gain)
    print(json.dumps({**found, "own": [str(d) for d in seen], "compiled_then": kernel.compiled}))


main(Path(sys.argv[1]))
