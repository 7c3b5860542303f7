"""Maintenance of stores: verify, repair, copy and remove. Capture and training do not use it."""
