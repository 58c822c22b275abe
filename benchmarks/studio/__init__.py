"""How long a click in the studio takes to fresh predictions: `python -m benchmarks.studio`."""
