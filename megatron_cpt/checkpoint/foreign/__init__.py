"""Checkpoints of other tools: Megatron-LM's `torch` format, DeepSpeed, other `torch_dist` layouts."""
