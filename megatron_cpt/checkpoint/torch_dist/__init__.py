"""Megatron's checkpoint folder: torch.distributed.checkpoint files, manifest, retention."""
