"""Distillation losses: pure functions of tensors, declared with their names."""
