"""What a sweep costs beyond its runs: `python -m benchmarks.sweeps`."""
