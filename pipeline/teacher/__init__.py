"""Stage one: the teacher is loaded or taught, runs once, and its features go to the store."""
