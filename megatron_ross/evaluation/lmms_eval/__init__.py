"""Exported checkpoints in lmms-eval, as the model `megatron_ross`."""
