"""Estimates of the disk, memory and time that a capture and its students take."""
