"""Adapters behind HTTP: a shelf of them over one backbone, a batcher, and an app (extra `adaptkit[serve]`).

Nothing here is needed to train or to predict; FastAPI is imported by `adaptkit.serving.app` alone.
"""
