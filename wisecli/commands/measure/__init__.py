"""Commands that measure an edited model, and that fetch what is measured with."""
