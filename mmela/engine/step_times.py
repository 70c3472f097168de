from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np

from .tables import text_table

# With fewer times, quartiles say nothing.
_FEW = 5


@dataclass(frozen=True)
class StepTimeSummary:
    """Median and middle half of step times.

    Attributes:
        median (float): In seconds.
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
            times (Sequence[float]): In seconds, at least one.

        Returns:
            StepTimeSummary: Their summary.
        """
        lower, median, upper = map(float, np.percentile(times, [25, 50, 75]))
        return cls(median, lower, upper, len(times))

    def change_from(self, other: 'StepTimeSummary') -> Optional[float]:
        """Relative change of the median, -0.2 for 20 % less.

        Args:
            other (StepTimeSummary): What to compare with.

        Returns:
            float | None: None if the change cannot be told from the spread: the middle
            halves overlap, or one of the two has fewer than 5 times.
        """
        few = min(self.count, other.count) < _FEW
        if few or self.lower <= other.upper and other.lower <= self.upper:
            return None
        return self.median / other.median - 1 if other.median else None


class StepTimes:
    """Step times of a training between its prunings.

    Args:
        runner (Runner): The runner. Step times that a resumed run brings with
            it do not count.
    """

    def __init__(self, runner) -> None:
        self._seen = len(_logged(runner))
        self._speeds: List[Tuple[int, StepTimeSummary]] = []

    def record(self, runner, active: int, step: int) -> None:
        """Write the step time since the last call to the visualizer.

        Args:
            runner (Runner): The runner.
            active (int): Active attentions in that time.
            step (int): Iterations done.
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
        """A table for a terminal; empty if there is nothing to compare."""
        return step_time_table(self._speeds) if len(self._speeds) > 1 else ''


def step_time_table(speeds: Sequence[Tuple[int, StepTimeSummary]]) -> str:
    """Format step times.

    Args:
        speeds (Sequence[tuple[int, StepTimeSummary]]): Active attentions and step
            times, in order.

    Returns:
        str: A table of 120 columns at most.
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
    """Logged times of all training steps, in seconds."""
    if 'train/time' not in runner.message_hub.log_scalars:
        return []
    return list(runner.message_hub.get_scalar('train/time').data[0])
