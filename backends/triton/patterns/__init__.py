"""Which nodes of a body a kernel computes: one module per kind of work, by structure and shapes."""
