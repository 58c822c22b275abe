"""Data: images and labels from any source, typed splits, few shots, frozen features."""
