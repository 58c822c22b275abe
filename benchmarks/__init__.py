"""Benchmarks and the scripts that made the embedded model."""
