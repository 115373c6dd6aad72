"""The laboratory: methods side by side, and studies of the paper's own choices."""
