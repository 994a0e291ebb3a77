"""A run's folder: settings, restarts, completion."""
