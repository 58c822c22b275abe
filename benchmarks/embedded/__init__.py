"""Accuracy of the methods on the embedded backbone and datasets."""
