"""The side memory and what routes to it; needs torch and transformers only."""
