"""The training loop of stage two."""
