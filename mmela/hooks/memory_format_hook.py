from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from ..arguments import CheckedArguments


def use_channels_last(part: nn.Module) -> None:
    """Run a network or a part of it in channels_last from now on.

    What it returns is contiguous, and so is what reaches the operators of mmcv
    within it: compiled mmcv 2.1 takes the input of its RoIAlign for contiguous
    whatever it is, and returns wrong numbers.

    Args:
        part (nn.Module): The network or part. Once more changes nothing.
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

    It is faster on a CPU. Unlike ``custom_hooks``, which a config replaces as a
    whole, ``default_hooks`` takes the hook under a name of its own, from the
    command line too:
    ``--cfg-options default_hooks.memory_format.type=MemoryFormatHook``, which is
    what ``--channels-last`` of ``tools/train.py`` and ``tools/test.py`` stands for.

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
