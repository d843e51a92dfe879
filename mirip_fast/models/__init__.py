"""Projector, score head, losses, checkpoints."""
