"""Training: data, packed batches, optimisers, checkpoints, and a small trainer."""
