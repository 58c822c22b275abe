"""Methods that put a small trained head or module behind frozen features, and zero-shot, which trains nothing."""
