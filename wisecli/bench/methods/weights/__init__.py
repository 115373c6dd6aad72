"""Methods that change the model's own weights."""
