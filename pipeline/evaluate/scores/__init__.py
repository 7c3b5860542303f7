"""The scores, one family of scores a file."""
