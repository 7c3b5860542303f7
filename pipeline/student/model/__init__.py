"""The student model: architecture, first weights, adapters, export."""
