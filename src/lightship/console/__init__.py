"""What a person sees in the terminal: streams and log lines."""
