"""From text examples to token rows."""
