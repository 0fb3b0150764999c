"""What emitted models call: the step and its cache, and the few operations torch does not have."""

from backends.pytorch.runtime import paged
from backends.pytorch.runtime.attention import attention
from backends.pytorch.runtime.cache import Cache
from backends.pytorch.runtime.experts import apply, experts
from backends.pytorch.runtime.fp8 import (
    Coded,
    Coding,
    number_format,
    quantize,
    scaled_linear,
    wide,
)
from backends.pytorch.runtime.mesh import Mesh
from backends.pytorch.runtime.modules import Numbered, making, named, table
from backends.pytorch.runtime.ops import gather, in_top, inf, largest, smallest, softmax, top
from backends.pytorch.runtime.stacked import stacked
from backends.pytorch.runtime.step import Step
from backends.pytorch.runtime.streams import Pending, arrived

__all__ = [
    "Cache",
    "Coded",
    "Coding",
    "Mesh",
    "Numbered",
    "Pending",
    "Step",
    "apply",
    "arrived",
    "attention",
    "experts",
    "gather",
    "in_top",
    "inf",
    "largest",
    "making",
    "named",
    "number_format",
    "paged",
    "quantize",
    "scaled_linear",
    "smallest",
    "softmax",
    "stacked",
    "table",
    "top",
    "wide",
]
