"""The training loop on Megatron-Core."""
