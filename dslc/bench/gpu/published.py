"""What others have measured, in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

SGLANG = "SGLang 0.5.14 (DeepGEMM, FlashAttention-3) on an H100 80 GB, AIConfigurator's data files"
PROFILE = "DeepSeek's training profile (profile-data) on an H800"


@dataclass(frozen=True)
class Published:
    """One figure.

    Attributes:
        aim: our time is to be at most this many times it.
    """

    milliseconds: float
    source: str
    aim: float


# FP8 block-scaled products, (N, K) -> tokens -> time. DeepGEMM's rate is to be reached to 75%.
GEMM = {
    (7168, 16384): {64: 0.0484, 128: 0.0508, 4096: 0.7290},
    (4096, 7168): {64: 0.0159, 128: 0.0165, 4096: 0.2332},
    (7168, 2048): {64: 0.0103, 128: 0.0123, 4096: 0.1037},
    (1536, 7168): {64: 0.0118, 128: 0.0157, 4096: 0.0927},
}

# Latent decode attention, 128 heads, BF16 cache, 4096 positions: sequences -> time.
DECODE = {1: 0.0232, 32: 0.0927, 64: 0.1398, 128: 0.2723}

# Latent prefill attention, one sequence of 4096, 128 heads of 192/128; within 1.5 times its time.
PREFILL = 1.237


def gemm(n: int, k: int, tokens: int) -> Published | None:
    found = GEMM.get((n, k), {}).get(tokens)
    return None if found is None else Published(found, SGLANG, 1 / 0.75)


def decode(sequences: int) -> Published | None:
    found = DECODE.get(sequences)
    return None if found is None else Published(found, SGLANG, 1 / 0.8)


def prefill() -> Published:
    return Published(PREFILL, PROFILE, 1.5)
