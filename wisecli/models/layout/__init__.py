"""Where a model keeps its layers and value matrices, and the site of an edit."""
