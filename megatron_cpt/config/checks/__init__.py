"""Relations between settings: what cannot work is refused with its numbers."""
