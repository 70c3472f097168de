"""Mean and standard deviation of samples."""

from typing import Optional

import torch
from torch import Tensor


class RunningMean:
    """Mean and standard deviation over batches of samples.

    The sums stay on the device, in double precision.
    """

    def __init__(self) -> None:
        self.sums: Optional[Tensor] = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Add a batch of samples, (B, ...)."""
        values = values.double()
        sums = torch.stack([values.sum(0), values.square().sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(values)

    def mean(self) -> Tensor:
        """Mean, (...)."""
        return (self.sums[0] / self.count).cpu()

    def std(self) -> Tensor:
        """Population standard deviation of the samples."""
        mean, square = (self.sums / self.count).cpu()
        return (square - mean.square()).clamp(min=0).sqrt()
