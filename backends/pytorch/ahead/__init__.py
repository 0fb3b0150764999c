"""Code compiled ahead of time: the step that decodes one token of one sequence on a CPU.

``model.py`` is what a person reads, and what takes prompts and batches. A step of one token is too
short for it: on a CPU the interpreter and the small operations take longer than reading the
weights. Such a step is traced from ``model.py`` itself and compiled by Inductor, one *piece* for
each kind of layer, so that neither time nor size grow with the number of layers.

`onetoken` and `products` are what ``model.py`` is traced with, `trace`, `segments` and `pieces` cut
the trace, `build` compiles the pieces, `plan` says how they follow one another, and `decoder` runs
them.
"""
