from typing import Dict, List, Sequence

import torch
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..structure import layer_attentions, prune
from .distributed import rewrap


def prune_run(
    runner, names: Sequence[str], keep_value: bool, followers: Dict[str, str]
) -> None:
    """Prune attentions in the model of a run and in all its copies.

    Args:
        runner (Runner): The runner.
        names (Sequence[str]): Names of the attentions in its model.
        keep_value (bool): See :func:`mmela.structure.prune`.
        followers (dict[str, str]): Modules that copy the structure of others, see
            :func:`followed`.
    """
    if not names:
        return
    names = [*names, *followed(names, followers)]
    for model in [runner.model, *averaged_copies(runner)]:
        known = layer_attentions(model)  # a copy may hold only a part
        prune(model, [name for name in names if name in known], keep_value)
    _forget_optimizer_state(runner)
    rewrap(runner)


def followed(names: Sequence[str], followers: Dict[str, str]) -> List[str]:
    """Translate names to the modules that follow others.

    Args:
        names (Sequence[str]): Names in a model.
        followers (dict[str, str]): Names of following modules, mapped to the module
            that each one follows.

    Returns:
        list[str]: For each name within a followed module, its counterpart in the
        follower.
    """
    return [
        follower + name[len(module) :]
        for follower, module in followers.items()
        for name in names
        if name.startswith(module + '.')
    ]


def averaged_copies(runner) -> List[nn.Module]:
    """Find averaged copies of the model in the hooks of a runner.

    Args:
        runner (Runner): The runner.

    Returns:
        list[nn.Module]: The averaged modules.
    """
    return [
        value.module.module if is_model_wrapper(value.module) else value.module
        for hook in runner.hooks
        for value in vars(hook).values()
        if isinstance(value, (BaseAveragedModel, AveragedModel))
    ]


def _optimizers(runner) -> List[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return [wrapper.optimizer for wrapper in wrappers]


def trained_parameters(runner) -> List[nn.Parameter]:
    """Parameters that the optimizers of a runner hold.

    Args:
        runner (Runner): The runner.

    Returns:
        list[nn.Parameter]: The parameters, including frozen ones.
    """
    return [
        param
        for optimizer in _optimizers(runner)
        for group in optimizer.param_groups
        for param in group['params']
    ]


def _forget_optimizer_state(runner) -> None:
    """Drop the optimizer state of parameters that are no longer trained.

    The parameters stay in their groups, so that the optimizer's state dict still
    loads into an unpruned network. Without a gradient they are neither updated nor
    decayed.
    """
    for optimizer in _optimizers(runner):
        for param in list(optimizer.state):
            if isinstance(param, torch.Tensor) and not param.requires_grad:
                del optimizer.state[param]
