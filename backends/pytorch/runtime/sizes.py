"""Numbers that the runtime and generated code share; importing this imports no torch."""

PAGE = 64  # positions of a page of the cache
