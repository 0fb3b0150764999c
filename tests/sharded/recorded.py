"""The picks of every routing of a model, as its mesh tells them."""

from contextlib import contextmanager


@contextmanager
def recorded(model):
    """Within, a list of (path of the array, int64 [tokens, picks]) of each routing."""
    log = []
    model.mesh.watch = lambda path, pick: log.append((path, pick.clone()))
    try:
        yield log
    finally:
        model.mesh.watch = None
