"""An edited model, and what is measured of it."""
