"""From raw sources to token rows: what text is read, and what ids stand for it."""
