"""What layer attentions and the pruning hook cost, measured on any device."""
