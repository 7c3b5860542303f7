"""The feature store: plan, forms, shards, receipts, manifests, reader; no model, no torch."""
