from typing import Any, Dict, Optional

from mmengine.dist import get_world_size, is_main_process

from .meter import NetworkKLMeter
from .windows import Window


class Measurement:
    """An open window: what it has measured, and from where a run may resume.

    mmengine resumes an epoch at its start, and a checkpoint may be saved at
    any time. So the sums at the start of the epoch or iteration in progress
    are kept beside those of now, and a checkpoint gets the ones that belong
    to the point at which it resumes.

    Args:
        window (tuple[int, int]): First and last epoch or iteration.
        meter (NetworkKLMeter): Measures.
        put_off (int): By how much the window was put off. Defaults to 0.

    Attributes:
        announced (bool): Whether the log has told of it.
    """

    def __init__(self, window: Window, meter: NetworkKLMeter, put_off: int = 0) -> None:
        self.window = window
        self.put_off = put_off
        self.meter = meter
        self.announced = False
        self.begin(window[0] - 1)
        self._running = False

    def begin(self, done: int) -> None:
        """Begin an epoch or iteration, after ``done`` others."""
        self._done, self._sums = done, self.meter.sums.clone()

    def start(self) -> None:
        """Measure the training passes from now on."""
        self._running = True
        self.meter.attach(training_only=True)

    def stop(self) -> None:
        """Measure no longer, and move the sums to rank 0: it saves them."""
        self.meter.detach()
        self.meter.gather()
        self._running = False

    def state_dict(self, resumes_after: int) -> Optional[Dict[str, Any]]:
        """What a checkpoint holds of the window.

        Args:
            resumes_after (int): Epochs or iterations that a run resumed from
                it counts as done.

        Returns:
            dict | None: ``window``, ``put_off``, ``done`` (after how many
            epochs or iterations the sums stand) and ``sums``. None within an iteration
            on several ranks, of which this one has not all sums.
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
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If other attentions were measured, or otherwise.
        """
        self.meter.load_state_dict(state['sums'])
        if not is_main_process():
            self.meter.sums.zero_()
