from statistics import median
from typing import List, Tuple

from .tables import step_time_table


class StepTimes:
    """Step times of a training between prunings.

    Args:
        runner (Runner): The runner. Step times from before a resume do not count.
    """

    def __init__(self, runner) -> None:
        self._seen = len(_logged(runner))
        # (active attentions, median step time, number of steps)
        self._speeds: List[Tuple[int, float, int]] = []

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
            seconds = float(median(times))
            self._speeds.append((active, seconds, len(times)))
            runner.visualizer.add_scalars(
                {'layer_attention/step_time': seconds}, step=step
            )

    def table(self) -> str:
        """Format the times for a terminal; empty if there is nothing to compare."""
        return step_time_table(self._speeds) if len(self._speeds) > 1 else ''


def _logged(runner) -> List[float]:
    """Times of all logged training steps, in seconds."""
    if 'train/time' not in runner.message_hub.log_scalars:
        return []
    return list(runner.message_hub.get_scalar('train/time').data[0])
