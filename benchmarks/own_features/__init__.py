"""All feature-level methods on published features of real images: `python -m benchmarks.own_features`."""
