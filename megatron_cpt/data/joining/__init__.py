"""Shards made of shards: merge and packing."""
