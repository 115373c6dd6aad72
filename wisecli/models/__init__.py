"""Base models: where they keep their matrices, how they are loaded, run and split at the edited layer."""
