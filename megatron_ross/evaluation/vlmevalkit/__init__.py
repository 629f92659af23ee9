"""Exported checkpoints in VLMEvalKit, registered in memory."""
