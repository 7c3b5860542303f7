"""Text from a model: batched, seeded, the same whatever rows share a batch."""
