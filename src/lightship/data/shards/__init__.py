"""Tar shards with an index: `lightship pack` and its format."""
