"""Files and folders: checkpoints read lazily, headers, JSON against a schema, outputs written whole or not at all."""
