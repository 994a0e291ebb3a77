"""Processes: launching, signals, collectives."""
