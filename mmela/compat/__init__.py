"""Compatibility with other packages: versions, checkpoints and operators."""
