"""Measure the cost of layer attentions and of the pruning hook on any device."""
