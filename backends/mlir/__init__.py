"""The MLIR backend: a program as an MLIR module that IREE compiles and runs without PyTorch."""
