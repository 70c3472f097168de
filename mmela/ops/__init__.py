from .layer_weighted_sum import layer_weighted_sum

__all__ = ['layer_weighted_sum']
