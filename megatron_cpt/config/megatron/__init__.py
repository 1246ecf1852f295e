"""Settings as arguments of Megatron-Core objects and as Megatron-LM flags."""
