"""Which Hugging Face tensors make which Megatron tensor."""
