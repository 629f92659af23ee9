"""Evaluators that need no framework."""
