"""`lightship doctor`: all that can be checked of a fit before it is started, in under 30 s."""
