"""Studies: variants times seeds of ordinary configs, run, compared, written down."""
