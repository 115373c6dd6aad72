"""Whether a prompt asks what it mentions."""
