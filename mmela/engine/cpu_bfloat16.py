"""Training in bfloat16 on a CPU."""

from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUBFloat16OptimWrapper(OptimWrapper):
    """Autocast to bfloat16 on a CPU, which ``AmpOptimWrapper`` of mmengine refuses.

    The range of bfloat16 is that of float32, so no loss is scaled. A config takes it
    by ``custom_imports=dict(imports=['mmela.engine.cpu_bfloat16'])``.

    Args:
        *args: As of :class:`mmengine.optim.OptimWrapper`.
        **kwargs: As of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of the forward pass and the loss.

        Args:
            model (nn.Module): The model.
        """
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
