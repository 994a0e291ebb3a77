"""Batches read from storage while training."""
