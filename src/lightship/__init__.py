"""lightship: train image classifiers with one command, anywhere."""

__version__ = "0.1.0"
