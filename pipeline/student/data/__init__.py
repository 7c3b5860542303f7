"""Batches of token rows with the teacher's features, read from the store."""
