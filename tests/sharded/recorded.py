"""The picks of every routing of a rank."""

from contextlib import contextmanager

from backends.pytorch.runtime.experts import watching


@contextmanager
def recorded():
    """Within, a list of (path of the array, int64 [tokens, picks]) of each routing."""
    log = []
    with watching(lambda path, pick: log.append((path, pick.flatten(0, -2).clone()))):
        yield log
