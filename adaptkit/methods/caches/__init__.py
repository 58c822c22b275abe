"""Methods that keep the few shots themselves as a cache."""
