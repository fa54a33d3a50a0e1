"""Speed, measured: `python -m benchmarks.run`, or `pytest benchmarks --benchmark-only`."""
