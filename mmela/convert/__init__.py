"""Convert trained networks: published checkpoints, slim networks, and export."""
