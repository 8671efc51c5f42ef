"""Are two checkpoints, or two models, the same? Tensor by tensor in bits, or by their logits.

bitwise   two checkpoints on disk, in either format, without building a model
fast      a checkpoint on disk against the checksums that were taken when it was written
logits    transformers' own model against the Megatron model, on one prompt
"""
