"""Timing kernels on a GPU beside torch's, at sizes of published models.

``cases`` says what is timed, ``rivals`` what torch has for it, ``published`` what others have
measured; ``machine`` times, ``record`` keeps what was timed, so that a run can be broken off and
gone on with.
"""
