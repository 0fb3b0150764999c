"""What emitted models call: the step and its cache, and the few operations torch does not have."""

from backends.pytorch.runtime.cache import Cache
from backends.pytorch.runtime.step import Step

__all__ = ["Cache", "Step"]
