"""Methods whose answers for one image depend on the others of its batch."""
