"""Conversations to masked shards."""
