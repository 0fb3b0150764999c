"""Hard models, each with its meaning in straight-line torch; see ``base``."""

from tests.nasty import attentions, blocks, recurrences
from tests.nasty.base import MODELS

__all__ = ["MODELS", "attentions", "blocks", "recurrences"]
