"""Prediction tables and their shards."""
