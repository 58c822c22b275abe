"""Multimodal language models as backbones: `families` the table, `loading` the loader, `model` the backbone."""
