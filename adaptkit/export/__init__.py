"""Adapted models outside adaptkit: folded, as files that other programs run, and many over one backbone."""
