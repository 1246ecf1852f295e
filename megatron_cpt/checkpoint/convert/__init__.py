"""Conversion between Hugging Face folders and Megatron checkpoints, and its proof."""
