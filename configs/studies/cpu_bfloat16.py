"""Training in bfloat16 on a CPU, for configs of studies by ``custom_imports``."""

from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Autocast to bfloat16; mmengine's ``AmpOptimWrapper`` refuses a CPU."""

    @contextmanager
    def optim_context(self, model):
        """Run the forward pass and the loss in it, as ``AmpOptimWrapper`` does."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
