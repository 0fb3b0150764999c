"""On a GPU (``make gpu`` sets TRITON_INTERPRET=0) the same tests run there: tensors that a test
makes are on it. What is about the interpreter, or has its own stub for a GPU, stays behind."""

import os

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") == "0":
    import torch

    torch.set_default_device("cuda")
    collect_ignore = [
        "test_interpreted.py",
        "test_bench_kernels.py",
        "test_bench_all.py",
        "test_tune.py",
    ]
