"""``dslc run`` as a worker of torchrun in which rank 1 is not as the others.

    torchrun ... one_differs.py HOW OTHER ARGUMENTS...

``raises``: it raises in its third step. ``directory``, ``--checkpoint``, ``--tokens``: it is given
OTHER in the place of what follows ``run``, or this option. ``same``: it is as the others.
"""

import os
import sys

from dslc.cli import main

if __name__ == "__main__":
    how, other, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        if how == "directory":
            arguments[1] = other
        elif how.startswith("--"):
            arguments[arguments.index(how) + 1] = other
        elif how == "raises":
            from backends.pytorch.runtime import Step

            commit, steps = Step.commit, []

            def failing(step):
                steps.append(step)
                if len(steps) == 5:
                    raise ValueError("a fuse has blown")
                commit(step)

            Step.commit = failing
    main(arguments)
