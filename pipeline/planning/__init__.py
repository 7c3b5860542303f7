"""What a capture and its students will take: disk, memory and time."""
