from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..arguments import CheckedArguments


def use_channels_last(part: nn.Module) -> None:
    """Convert a network or a part of it to channels_last.

    Its outputs stay contiguous, and so do the inputs of mmcv operators within it:
    compiled mmcv 2.1 assumes that the input of RoIAlign is contiguous, and returns
    wrong numbers if it is not.

    Args:
        part (nn.Module): The network or part. A second call changes nothing.
    """
    part.to(memory_format=torch.channels_last)
    if _contiguous_outputs not in part._forward_hooks.values():
        part.register_forward_hook(_contiguous_outputs)
    for module in part.modules():
        if (
            type(module).__module__.startswith('mmcv.ops.')
            and _contiguous_inputs not in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_contiguous_inputs)


@HOOKS.register_module()
class MemoryFormatHook(Hook, metaclass=CheckedArguments):
    """Run a part of the model in channels_last, see :func:`use_channels_last`.

    This is faster on a CPU. Add the hook to ``default_hooks``, where it has its own
    name, rather than to ``custom_hooks``, which a config can only replace as a whole.
    On the command line this is
    ``--cfg-options default_hooks.memory_format.type=MemoryFormatHook``, or
    ``--channels-last`` of ``tools/train.py`` and ``tools/test.py`` for short.

    Args:
        module (str): Dotted name of the part; an empty name means the whole model.
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
                f'{type(model).__name__} has no module {self.module!r}; its direct '
                f'submodules are {names}'
            ) from error
        use_channels_last(part)


def _contiguous(value: Any) -> Any:
    """Make a tensor, or those in a list or tuple, contiguous."""
    if torch.is_tensor(value):
        return value.contiguous()
    if type(value) in (list, tuple):
        return type(value)(_contiguous(item) for item in value)
    return value


def _contiguous_outputs(module: nn.Module, args: tuple, outputs: Any) -> Any:
    return _contiguous(outputs)


def _contiguous_inputs(module: nn.Module, args: tuple) -> tuple:
    return _contiguous(args)
