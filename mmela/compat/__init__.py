"""Versions of other packages, their checkpoints and their operators."""
