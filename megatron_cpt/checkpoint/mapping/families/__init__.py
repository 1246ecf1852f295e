"""Architectures that convert: a file for each. A new one is a file here, a line in `known.py` and a test case."""
