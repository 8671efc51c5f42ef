"""Live Megatron models, as the source and as the target of a conversion."""
