"""Python names for the names of a source, which may be Python's or torch's own."""

from __future__ import annotations

import keyword
import re

# What instances of torch.nn.Module have already: a parameter called ``train`` would hide a method,
# or be hidden by it. Listed, because emission does not import torch.
TAKEN = frozenset(
    """
    T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double
    dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu load_state_dict modules mtia named_buffers named_children named_modules
    named_parameters parameters path register_backward_hook register_buffer register_forward_hook
    register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory state_dict to to_empty train training type xpu
    zero_grad
    """.split()
)


def identifier(name: str) -> str:
    """A Python identifier close to ``name``; a keyword gets an underscore behind it."""
    text = re.sub(r"\W", "_", name)
    if not text or text[0].isdigit():
        text = f"_{text}"
    return text + "_" if keyword.iskeyword(text) else text


def attribute(name: str) -> str:
    """The attribute under which a module has the parameter or child that the source calls ``name``.

    It is ``name`` itself unless that cannot be: different names have different attributes.
    """
    bare = name.rstrip("_")
    if keyword.iskeyword(bare) or bare in TAKEN or name.startswith("_"):
        return f"{name}_"
    return name


def attribute_path(path: str) -> str:
    """Where an emitted model keeps a parameter: ``layers[3].mlp.W`` is ``layers.3.mlp.W``."""
    parts = path.replace("[", ".").replace("]", "").split(".")
    return ".".join(part if part.isdigit() else attribute(part) for part in parts)


class Scope:
    """Hands out names, each once."""

    def __init__(self, *taken: str):
        self._taken = set(taken)

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def take(self, wanted: str) -> str:
        """``wanted`` as an identifier, or with a number if that is taken."""
        stem = identifier(wanted)
        name, number = stem, 2
        while name in self._taken:
            name, number = f"{stem}_{number}", number + 1
        self._taken.add(name)
        return name
