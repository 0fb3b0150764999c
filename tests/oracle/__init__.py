"""transformers as an independent oracle for DeepSeek-V3.

checkpoint.py   has transformers write small random checkpoints with the published tensor names
reference.py    computes with transformers what our programs should compute on them
fp8.py          rewrites a checkpoint in the published FP8 form
compare.py      says whether two results are equal, in this project's sense
cases.py        the checkpoints our DeepSeek-V3 is held to, and our programs for them
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
