"""What a model scores, how it agrees with its teacher, and what it costs."""
