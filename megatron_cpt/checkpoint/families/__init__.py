"""Architectures that convert: a file for each, and the kinds, blocks and readers that they share."""
