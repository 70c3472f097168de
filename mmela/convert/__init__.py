"""Conversion of trained networks: published ones, slim ones, and export."""
