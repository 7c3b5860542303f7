"""Distillation losses: pure functions of tensors, one loss a file."""
