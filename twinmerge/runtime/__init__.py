"""Online: an artifact, run. Never sees the original checkpoints."""
