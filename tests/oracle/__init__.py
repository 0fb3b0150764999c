"""transformers as an independent oracle.

checkpoint.py   has transformers write small random DeepSeek-V3 checkpoints, MTP included
reference.py    computes with transformers what our programs should compute on them
fp8.py          rewrites a checkpoint in the published FP8 form
compare.py      says whether two results are equal, in this project's sense
cases.py        the checkpoints our DeepSeek-V3 is held to, and our programs for them
families.py     the same for the other families: their test modules say what is special about them
feeding.py      tests that all families pass
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
