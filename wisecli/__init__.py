"""Edit what a language model knows, without retraining it (WISE, arXiv 2405.14768)."""

__version__ = "0.1.0"
