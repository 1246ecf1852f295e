"""Settings: schema, loading with origins, checks, and their Megatron-Core names; imports no torch."""
