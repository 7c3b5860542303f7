"""Forms trade bytes for fidelity, one form a file."""
