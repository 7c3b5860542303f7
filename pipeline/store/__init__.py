"""The feature store: plan, forms, shards, receipts, manifests and reader, without torch."""
