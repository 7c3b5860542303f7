"""The feature store: plan, forms, shards, receipts, manifests, reader. Knows no model and no torch."""
