"""How tests load models."""

from wisecli.config import LoadOptions

CPU = LoadOptions(device="cpu")
