"""Forms: how the values of a signal are stored. Each file defines one form."""
