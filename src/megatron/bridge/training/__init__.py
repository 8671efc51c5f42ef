"""The few names of a trainer's toolbox that clients import from here.

There is no training loop: models are trained by megatron-core's schedules and optimizers.
"""
