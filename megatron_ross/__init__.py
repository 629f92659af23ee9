"""Megatron-Ross: training for reconstructive visual instruction tuning on Megatron Core."""

__version__ = "0.1.0"
