"""Studies: run variants of ordinary configs with several seeds, and compare them."""
