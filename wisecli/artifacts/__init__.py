"""What lies on disk between the commands: shards, memories, their manifests and the checks of both."""
