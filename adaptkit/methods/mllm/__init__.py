"""Methods that ask a multimodal language model."""
