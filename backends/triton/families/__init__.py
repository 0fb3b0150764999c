"""One module per family of kernels; each has ``generate(spec, target) -> Operator``."""
