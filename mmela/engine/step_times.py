from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np

from .tables import text_table

# Fewer times give no useful quartiles
_FEW = 5


@dataclass(frozen=True)
class StepTimeSummary:
    """Median and quartiles of step times.

    Attributes:
        median (float): Median in seconds.
        lower (float): First quartile in seconds.
        upper (float): Third quartile in seconds.
        count (int): Number of times.
    """

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> 'StepTimeSummary':
        """Summarize step times.

        Args:
            times (Sequence[float]): At least one time, in seconds.

        Returns:
            StepTimeSummary: The summary.
        """
        lower, median, upper = map(float, np.percentile(times, [25, 50, 75]))
        return cls(median, lower, upper, len(times))

    def change_from(self, other: 'StepTimeSummary') -> Optional[float]:
        """Compute the relative change of the median, such as -0.2 for 20 % less.

        Args:
            other (StepTimeSummary): The reference.

        Returns:
            float | None: The change; None if it may be due to the spread, because the
            ranges between the quartiles overlap or one side has fewer than 5 times.
        """
        few = min(self.count, other.count) < _FEW
        if few or self.lower <= other.upper and other.lower <= self.upper:
            return None
        return self.median / other.median - 1 if other.median else None


class StepTimes:
    """Step times of a training between prunings.

    Args:
        runner (Runner): The runner. Step times from before a resume do not count.
    """

    def __init__(self, runner) -> None:
        self._seen = len(_logged(runner))
        # (active attentions, step times)
        self._speeds: List[Tuple[int, StepTimeSummary]] = []

    def record(self, runner, active: int, step: int) -> None:
        """Write the step time since the last call to the visualizer.

        Args:
            runner (Runner): The runner.
            active (int): Number of active attentions in that time.
            step (int): Number of iterations done.
        """
        times = _logged(runner)[self._seen :]
        self._seen += len(times)
        if times:
            summary = StepTimeSummary.of(times)
            self._speeds.append((active, summary))
            runner.visualizer.add_scalars(
                {'layer_attention/step_time': summary.median}, step=step
            )

    def table(self) -> str:
        """Format the times for a terminal; empty if there is nothing to compare."""
        return step_time_table(self._speeds) if len(self._speeds) > 1 else ''


def step_time_table(speeds: Sequence[Tuple[int, StepTimeSummary]]) -> str:
    """Format step times.

    Args:
        speeds (Sequence[tuple[int, StepTimeSummary]]): Active attentions and step
            times, in order.

    Returns:
        str: A table of at most 120 columns.
    """
    rows = []
    first = speeds[0][1]
    for index, (active, times) in enumerate(speeds):
        change = times.change_from(first)
        note = 'not clear' if change is None else f'{100 * change:+.1f} %'
        half = f'{times.lower:.4g} to {times.upper:.4g}'
        cells = [str(active), f'{times.median:.4g}', half, note if index else '']
        rows.append([*cells, str(times.count)])
    columns = ['>active attentions', '>median step time (s)', '>middle half (s)']
    return text_table([*columns, '>change of the median', '>steps'], rows)


def _logged(runner) -> List[float]:
    """Times of all logged training steps, in seconds."""
    if 'train/time' not in runner.message_hub.log_scalars:
        return []
    return list(runner.message_hub.get_scalar('train/time').data[0])
