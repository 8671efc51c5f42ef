"""Boxes of tensors and tensors without their data: the words that all other folders share."""
