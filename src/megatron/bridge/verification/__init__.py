"""Are two checkpoints, or two models, the same? Tensor by tensor in bits, or by their logits.

tensors   two checkpoints on disk, in either format, without building a model
logits    transformers' own model against the Megatron model, on one prompt
"""
