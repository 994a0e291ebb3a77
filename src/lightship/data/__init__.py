"""From a URL to batches on the device."""
