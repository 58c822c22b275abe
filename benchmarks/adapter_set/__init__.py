"""What a hundred adapters on a batch cost, as a ratio to one: `python -m benchmarks.adapter_set`."""
