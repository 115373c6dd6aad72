"""Which edit a prompt asks for: its window, and what is compared in it."""
