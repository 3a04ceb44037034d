"""`sdc compress`: smaller networks, from a checkpoint to a checkpoint."""
