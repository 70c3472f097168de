from typing import List, Optional, Sequence, Tuple

from mmengine.hooks import CheckpointHook
from mmengine.runner import IterBasedTrainLoop

Window = Tuple[int, int]


def check_windows(windows: Sequence[Window]) -> List[Window]:
    """Sort measuring windows and check that they are sound and disjoint.

    Args:
        windows (Sequence[tuple[int, int]]): First and last epoch or iteration
            of each, counted from 1.

    Returns:
        list[tuple[int, int]]: In order.

    Raises:
        TypeError: If one is not a pair of integers.
        ValueError: If one starts before 1, is reversed or overlaps another.
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
    """Check that windows fit a run, and warn of what would go wrong in it.

    Args:
        runner (Runner): The runner, before training.
        windows (Sequence[tuple[int, int]]): Of :func:`check_windows`.
        by_epoch (bool): Whether they count epochs; otherwise iterations.
        put_off_until (int, optional): Up to where one may be put off. Defaults
            to None.

    Raises:
        ValueError: If the loop counts something else, or the training ends
            before a window does or may do.
    """
    iter_based = isinstance(runner.train_loop, IterBasedTrainLoop)
    if by_epoch and iter_based:
        raise ValueError(
            'LayerAttentionPruningHook counts epochs, but the run has an '
            'IterBasedTrainLoop; give the windows in iterations and set '
            'by_epoch=False'
        )
    if not by_epoch and not iter_based:
        raise ValueError(
            'LayerAttentionPruningHook has by_epoch=False, which needs an '
            f'IterBasedTrainLoop, not {type(runner.train_loop).__name__}; '
            'give the windows in epochs and set by_epoch=True'
        )
    end = runner.max_epochs if by_epoch else runner.max_iters
    unit = 'epochs' if by_epoch else 'iterations'
    if put_off_until is not None and put_off_until > end:
        raise ValueError(
            f'put_off_until={put_off_until} is after the last of {end} {unit}'
        )
    for window in windows[-1:]:
        if window[1] > end:
            raise ValueError(f'window {window} ends after the last of {end} {unit}')
        if window[1] == end:
            runner.logger.warning(
                f'Window {window} ends with the training: what it prunes '
                'is never trained without.'
            )
    if by_epoch and windows:
        _warn_of_accumulation(runner)
    for hook in runner.hooks if windows else ():
        if not isinstance(hook, CheckpointHook):
            continue
        if hook.max_keep_ckpts == 1:
            runner.logger.warning(
                'max_keep_ckpts=1: mmengine removes the only checkpoint before it '
                'writes the next, so a run killed in between cannot be resumed, nor '
                'end with the same pruning. Keep 2 or more.'
            )
        if by_epoch and not hook.by_epoch:
            runner.logger.warning(
                'Checkpoints are saved by iterations in a loop of epochs: mmengine '
                'resumes such a one at the start of its epoch, which is trained on '
                'twice then, so pruning may differ from that of a run that was '
                'not interrupted.'
            )


def _warn_of_accumulation(runner) -> None:
    """Say where gradients are accumulated across the end of an epoch."""
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
            'an epoch. Gradients that are left at its end are in no checkpoint, so a '
            'resumed run does not end as one without a stop. Choose a divisor of '
            f'{length} to have both alike.'
        )
