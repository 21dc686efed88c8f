"""What several test files share: tiny models, data sets and checkpoints, made on the spot."""
