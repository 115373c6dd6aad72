"""Names of the files and directories that mark what a directory is."""

# Of shards, of a memory or a routed checkpoint, and of a merged checkpoint.
SHARDS = "shards.json"
MEMORY = "router.json"
MERGED = "wise.json"
# The file with the decoder blocks that are a memory.
MEMORY_TENSORS = "model-memory.safetensors"
# What makes of a memory one that is edited again and again.
HISTORY = "history"
