"""The library behind `decant`: offline feature-aligned distillation, in layers that import only downwards."""
