"""Proof of shards against their sources, and the way back from a token to its line."""
