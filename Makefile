# What takes a GPU. Everything else is in ./dev.
#
#   make gpu    all GPU tests, then `dslc bench --kernels`; parts of 8 minutes, the next run goes on

PYTHON ?= $(firstword $(wildcard .venv/bin/python) python3)

.PHONY: gpu
gpu:
	@$(PYTHON) benchmarks/gpu.py
