"""megatron-core's torch_dist checkpoints: what they say, and how one is laid out."""
