"""Make a teacher available: load, fine-tune, build from scratch, quantise, place on devices."""
