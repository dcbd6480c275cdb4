"""The paper's tables as experiments that run: `python -m benchmarks.paper`."""
