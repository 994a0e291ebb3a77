"""Checkpoints: writing, records, reading, when to save."""
