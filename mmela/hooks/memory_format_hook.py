from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn


@HOOKS.register_module()
class MemoryFormatHook(Hook):
    """Run a part of the model in channels_last, which is faster on a CPU.

    Its outputs are contiguous again: compiled mmcv 2.1 takes the input of its
    RoIAlign for that whatever it is, and returns wrong numbers.

    Args:
        module (str): Dotted name of the part; an empty one is the whole model.
            Defaults to ``'backbone'``.

    Raises:
        ValueError: If the model has no such part, before the first iteration.
    """

    def __init__(self, module: str = 'backbone') -> None:
        self.module = module

    def before_train(self, runner) -> None:
        """Change the format before training."""
        self._apply(runner.model)

    def before_val(self, runner) -> None:
        """Change the format before validation."""
        self._apply(runner.model)

    def before_test(self, runner) -> None:
        """Change the format before testing."""
        self._apply(runner.model)

    def _apply(self, model: nn.Module) -> None:
        if is_model_wrapper(model):
            model = model.module
        try:
            part = model.get_submodule(self.module)
        except AttributeError as error:
            names = ', '.join(repr(name) for name, _ in model.named_children())
            raise ValueError(
                f'module={self.module!r} is not in {type(model).__name__}; its '
                f'immediate parts are {names}'
            ) from error
        part.to(memory_format=torch.channels_last)
        if _contiguous_outputs not in part._forward_hooks.values():
            part.register_forward_hook(_contiguous_outputs)


def _contiguous_outputs(module: nn.Module, args: tuple, outputs: Any) -> Any:
    """Forward hook: make the tensors that a module returns contiguous."""
    if torch.is_tensor(outputs):
        return outputs.contiguous()
    if type(outputs) in (list, tuple):
        return type(outputs)(
            _contiguous_outputs(module, args, output) for output in outputs
        )
    return outputs
