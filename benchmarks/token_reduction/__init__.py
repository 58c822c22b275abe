"""What leaving out image tokens costs and saves."""
