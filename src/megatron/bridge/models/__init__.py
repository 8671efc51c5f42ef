"""Reading Hugging Face models, mapping them, and building them in Megatron-Core."""
