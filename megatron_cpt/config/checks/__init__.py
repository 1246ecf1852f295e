"""Checks of relations between settings; impossible combinations are refused with their numbers."""
