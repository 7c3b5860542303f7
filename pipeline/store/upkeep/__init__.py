"""Care of whole stores, which captures and students do without: verify, repair, copy, remove."""
