"""Taps: read hidden states, query, key, value and head input of any transformers model."""
