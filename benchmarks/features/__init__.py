"""How long methods on frozen features take at ImageNet's size, and what one pass of the encoder would take instead."""
