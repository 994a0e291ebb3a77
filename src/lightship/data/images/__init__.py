"""From encoded bytes to RGB pixels."""
