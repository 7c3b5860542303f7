"""Stage one: the teacher's features, computed once and written to the store."""
