"""What every test needs: no network, no deadlines, and no fight over the cores."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Handing small matrices to other threads takes longer than multiplying them, on a busy machine ten
# times longer. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's kernels are interpreted, on tensors of the CPU. Read when triton is imported. What is
# compiled ahead of time is compiled by processes without it; tests on a GPU set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is slow, not wrong. In CI the examples are the same in every run.
settings.register_profile("dslc", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("dslc")
