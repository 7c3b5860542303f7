"""The library behind `decant`: offline feature-aligned distillation, in layers."""
