"""transformers' implementation of the checkpoint's model, at the settings that are fastest here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from dslc.bench.contestants import Absent, Round, Setup

# Implementations of attention and, where a model has them, of experts.
SETTINGS = [
    {"attn_implementation": "sdpa", "experts_implementation": "eager"},
    {"attn_implementation": "eager", "experts_implementation": "eager"},
    {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
    {"attn_implementation": "sdpa", "experts_implementation": "batched_mm"},
]
# What the settings are chosen by: few tokens, as one of them gathers weights for each.
TRIAL_PROMPT, TRIAL_NEW = 32, 8
NEAR = 4  # settings at most so many times slower are tried on a whole prompt


class WithTransformers:
    """Loading tries the settings; prefill and decode each go on with their fastest."""

    def __init__(self, setup: Setup):
        try:
            import transformers
        except ImportError:
            raise Absent("transformers is not installed") from None
        if setup.checkpoint is None:
            raise Absent("it needs a --checkpoint (dslc init writes one)")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(setup.threads)
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                setup.checkpoint, dtype=getattr(torch, setup.dtype)
            ).eval()
        except Exception as error:  # whatever it raises for a model that it does not know
            raise Absent(f"it cannot load the checkpoint: {str(error).splitlines()[0]}") from None
        trial = [(1 + i) % setup.vocab for i in range(TRIAL_PROMPT)]
        tried = []
        for setting in SETTINGS:
            try:
                self._choose(setting)
                self._run(trial, 2)
                prefill, decode, _ = self._run(trial, TRIAL_NEW)
            except Exception:  # this model or version does not know the setting
                continue
            tried.append((prefill, decode, setting))
        if not tried:
            raise Absent("none of its settings runs")
        near = [row[2] for row in tried if row[0] <= NEAR * min(tried, key=lambda r: r[0])[0]]
        self._for_prefill = min(near, key=lambda setting: self._prefill(setting, setup))
        self._for_decode = min(tried, key=lambda row: row[1])[2]
        self.about = (
            f"transformers {transformers.__version__}, prefill {_said(self._for_prefill)}, "
            f"decode {_said(self._for_decode)}"
        )

    def round(self, prompt: Sequence[int], new: int) -> Round:
        self._choose(self._for_decode)
        prefill, decode, tokens = self._run(prompt, new)
        if self._for_prefill != self._for_decode:
            self._choose(self._for_prefill)
            prefill, _, _ = self._run(prompt, 1)
        return Round(prefill, decode, tokens)

    def _prefill(self, setting: dict[str, str], setup: Setup) -> float:
        """Seconds for a prompt as long as those that are timed."""
        self._choose(setting)
        prompt = [(1 + i) % setup.vocab for i in range(setup.prompt)]
        return min(self._run(prompt, 1)[0] for _ in range(3))

    def _choose(self, setting: dict[str, str]) -> None:
        self._model.set_attn_implementation(setting["attn_implementation"])
        if hasattr(self._model, "set_experts_implementation"):
            self._model.set_experts_implementation(setting["experts_implementation"])

    @torch.no_grad()
    def _run(self, prompt: Sequence[int], new: int) -> tuple[float, float, list[int]]:
        tokens: list[int] = []
        times = [time.perf_counter()]
        given, past = torch.tensor([list(prompt)]), None
        for _ in range(new):
            out = self._model(given, past_key_values=past, use_cache=True, logits_to_keep=1)
            given, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            tokens.append(int(given))
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1], tokens


def _said(setting: dict[str, str]) -> str:
    attention, experts = setting["attn_implementation"], setting["experts_implementation"]
    return f"{attention} attention and {experts} experts"
