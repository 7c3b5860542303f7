"""A student's reduced vocabulary and its tokenizer."""
