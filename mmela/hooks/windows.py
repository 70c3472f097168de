from typing import List, Optional, Sequence, Tuple

from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop

Window = Tuple[int, int]


def check_windows(windows: Sequence[Window]) -> List[Window]:
    """Sort measuring windows and check that they are valid and disjoint.

    Args:
        windows (Sequence[tuple[int, int]]): First and last epoch or iteration
            of each, counted from 1.

    Returns:
        list[tuple[int, int]]: The windows in order.

    Raises:
        TypeError: If a window is not a pair of integers.
        ValueError: If a window starts before 1, is reversed or overlaps another.
    """
    checked = []
    for window in windows:
        if (
            not isinstance(window, (tuple, list))
            or len(window) != 2
            or not all(type(bound) is int for bound in window)
        ):
            raise TypeError(f'window {window} is not a pair of integers (first, last)')
        first, last = window
        if first < 1:
            raise ValueError(
                f'window {(first, last)} starts before 1; epochs '
                'and iterations are counted from 1'
            )
        if last < first:
            raise ValueError(
                f'window {(first, last)} is reversed: it ends before it starts'
            )
        checked.append((first, last))
    checked.sort()
    for earlier, later in zip(checked, checked[1:]):
        if later[0] <= earlier[1]:
            raise ValueError(f'windows {earlier} and {later} overlap')
    return checked


def check_run(
    runner,
    windows: Sequence[Window],
    by_epoch: bool,
    put_off_until: Optional[int] = None,
) -> None:
    """Check that windows fit a run, and warn about settings that break resuming.

    Args:
        runner (Runner): The runner, before training.
        windows (Sequence[tuple[int, int]]): Result of :func:`check_windows`.
        by_epoch (bool): Whether they count epochs; otherwise iterations.
        put_off_until (int, optional): Last epoch or iteration to which a window
            may be put off. Defaults to None.

    Raises:
        ValueError: If the training loop does not count that unit, or if a window
            or ``put_off_until`` lies after the end of the training.
    """
    iter_based = isinstance(runner.train_loop, IterBasedTrainLoop)
    if by_epoch and iter_based:
        raise ValueError(
            'LayerAttentionPruningHook counts epochs, but the run has an '
            'IterBasedTrainLoop; set by_epoch=False and give the windows in '
            'iterations'
        )
    if not by_epoch and not iter_based:
        raise ValueError(
            'LayerAttentionPruningHook has by_epoch=False, which needs an '
            f'IterBasedTrainLoop, not {type(runner.train_loop).__name__}; '
            'set by_epoch=True and give the windows in epochs'
        )
    end = runner.max_epochs if by_epoch else runner.max_iters
    unit = 'epochs' if by_epoch else 'iterations'
    if put_off_until is not None and put_off_until > end:
        raise ValueError(
            f'put_off_until={put_off_until} exceeds the {end} {unit} of the training'
        )
    for window in windows[-1:]:
        if window[1] > end:
            raise ValueError(
                f'window {window} ends after the {end} {unit} of the training'
            )
        if window[1] == end:
            runner.logger.warning(
                f'Window {window} ends with the training, so the network gets no '
                'training after this pruning. End the window earlier.'
            )
    if by_epoch and windows:
        _warn_of_accumulation(runner)
    for hook in runner.hooks if windows else ():
        if not isinstance(hook, CheckpointHook):
            continue
        if hook.max_keep_ckpts == 1:
            runner.logger.warning(
                'max_keep_ckpts=1: mmengine deletes the only checkpoint before it '
                'writes the next one, so a run killed in between cannot be resumed. '
                'Set max_keep_ckpts to 2 or more.'
            )
        if by_epoch and not hook.by_epoch:
            runner.logger.warning(
                'Checkpoints are saved by iteration, but the loop counts epochs. '
                'mmengine resumes such a checkpoint at the start of its epoch and '
                'repeats iterations, so a resumed run may prune differently. Set '
                'by_epoch=True in the CheckpointHook.'
            )


def _warn_of_accumulation(runner) -> None:
    """Warn if gradients are accumulated across the end of an epoch."""
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    if counts <= 1:
        return
    try:
        length = len(runner.train_dataloader)
    except TypeError:  # an endless data set
        return
    if length % counts:
        runner.logger.warning(
            f'accumulative_counts={counts} does not divide the {length} iterations of '
            'an epoch. Checkpoints do not save the gradients left at its end, so a '
            f'resumed run gives other results. Choose a divisor of {length}.'
        )
