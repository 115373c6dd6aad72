"""How much is read and kept for the background statistics; without torch, as a plan counts by it."""

from __future__ import annotations

# One unrelated text in so many is continued by the model, by so many tokens.
CONTINUED, CONTINUATION_TOKENS = 5, 12
# Keys that are kept for calibration.
CALIBRATION_KEYS = 4096
