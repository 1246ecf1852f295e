"""The sub-verbs of `data`."""
