"""Running a model: activations, the layers above the site, generation, losses."""
