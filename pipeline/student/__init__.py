"""Stage two: students trained from the store alone."""
