"""A server under load against the bare batched encoder: `python -m benchmarks.serving`."""
