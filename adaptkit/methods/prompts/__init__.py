"""Methods that learn the text, or the text and image, prompts of a frozen backbone."""
