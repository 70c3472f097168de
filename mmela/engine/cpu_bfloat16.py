"""Training in bfloat16 on a CPU."""

from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUBFloat16OptimWrapper(OptimWrapper):
    """Autocast to bfloat16 on a CPU, which mmengine's ``AmpOptimWrapper`` rejects.

    bfloat16 has the range of float32, so the loss needs no scaling. To use it, add
    ``custom_imports=dict(imports=['mmela.engine.cpu_bfloat16'])`` to a config.

    Args:
        *args: See :class:`mmengine.optim.OptimWrapper`.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context for the forward pass and the loss.

        Args:
            model (nn.Module): The model.
        """
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
