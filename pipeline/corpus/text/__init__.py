"""From raw sources to text examples with splits."""
