"""What a model folder or checkpoint holds, from headers and configs alone: no weights are read."""
