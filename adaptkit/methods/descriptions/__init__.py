"""Methods that describe classes in sentences instead of naming them."""
