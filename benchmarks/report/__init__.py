"""How long a report takes over many results."""
