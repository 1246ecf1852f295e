"""Document files: found by name, read as pieces, parsed into records, written again."""
