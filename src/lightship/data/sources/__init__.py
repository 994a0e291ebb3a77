"""What lies at a root, and its samples as manifests."""
