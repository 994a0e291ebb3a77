"""What watches a run: each callback is one file."""
