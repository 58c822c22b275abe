"""Memory of quantised towers."""
