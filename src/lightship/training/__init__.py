"""Training: trainer, loop and callbacks."""
