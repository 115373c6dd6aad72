"""The side memories: facts with keys and residuals, or matrices, and their calibration."""
