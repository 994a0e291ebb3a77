"""Models as files that run without lightship."""
