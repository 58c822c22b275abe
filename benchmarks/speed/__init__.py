"""Speed of the toolkit as ratios against a plain path, measured within one run: `python -m benchmarks.speed`."""
