from typing import Any, Dict, Optional

from mmengine.dist import get_world_size, is_main_process

from .meter import NetworkKLMeter
from .windows import Window


class Measurement:
    """An open window and its sums, which a resumed run continues.

    mmengine resumes an epoch at its start, but may save a checkpoint at any time.
    So this class keeps the sums at the start of the current epoch or iteration
    beside the current ones, and gives a checkpoint those that match the point from
    which it resumes.

    Args:
        window (tuple[int, int]): First and last epoch or iteration.
        meter (NetworkKLMeter): The meter.
        put_off (int): Epochs or iterations by which the window was put off.
            Defaults to 0.

    Attributes:
        announced (bool): Whether its start has been logged.
    """

    def __init__(self, window: Window, meter: NetworkKLMeter, put_off: int = 0) -> None:
        self.window = window
        self.put_off = put_off
        self.meter = meter
        self.announced = False
        self.begin(window[0] - 1)
        self._running = False

    def begin(self, done: int) -> None:
        """Begin an epoch or iteration after ``done`` earlier ones."""
        self._done, self._sums = done, self.meter.sums.clone()

    def start(self) -> None:
        """Start to measure training passes."""
        self._running = True
        self.meter.attach(training_only=True)

    def stop(self) -> None:
        """Stop measuring, and move the sums to rank 0, which saves them."""
        self.meter.detach()
        self.meter.gather()
        self._running = False

    def state_dict(self, resumes_after: int) -> Optional[Dict[str, Any]]:
        """State of the window for a checkpoint.

        Args:
            resumes_after (int): Epochs or iterations that a run resumed from the
                checkpoint counts as done.

        Returns:
            dict | None: ``window``, ``put_off``, ``done`` (the number of epochs or
            iterations that the sums cover) and ``sums``. None during an iteration on
            several ranks, because the sums are then spread over them.
        """
        done, sums = self._done, self._sums
        if resumes_after != done:
            if self._running and get_world_size() > 1:
                return None
            done, sums = done + 1, self.meter.sums
        return dict(
            window=list(self.window),
            put_off=self.put_off,
            done=done,
            sums=self.meter.state_dict(sums),
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: If the state comes from other attentions or settings.
        """
        self.meter.load_state_dict(state['sums'])
        if not is_main_process():
            self.meter.sums.zero_()
