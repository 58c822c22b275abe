"""Methods that add small trainable parts to the layers inside a frozen tower, through peft."""
