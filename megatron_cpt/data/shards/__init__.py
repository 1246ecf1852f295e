"""Token files on disk: index, mask, manifest, discovery, skip lists."""
