"""A stage's samples and batches."""
