"""From documents to tokens to blends."""
