"""Pruning support for mmengine's runners, and a runner with a movable data root."""

from .data_root import DataRootRunner, set_data_root
from .distributed import check_wrapper, resumed_from, rewrap, rewrap_after_loading
from .pruned_run import averaged_copies, followed, prune_run, trained_parameters
from .step_times import StepTimes

__all__ = [
    'DataRootRunner',
    'StepTimes',
    'averaged_copies',
    'check_wrapper',
    'followed',
    'prune_run',
    'resumed_from',
    'rewrap',
    'rewrap_after_loading',
    'set_data_root',
    'trained_parameters',
]
