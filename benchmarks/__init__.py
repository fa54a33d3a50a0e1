"""Speed, measured: `python -m benchmarks.run cpu`, or `pytest benchmarks --benchmark-only`."""
