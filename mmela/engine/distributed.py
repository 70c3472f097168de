import gc

from mmengine.model import is_model_wrapper
from mmengine.runner import FlexibleRunner
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_wrapper(model: nn.Module) -> None:
    """Check that parameters can be pruned in a model as it is wrapped.

    Args:
        model (nn.Module): The model of a runner.

    Raises:
        ValueError: If its wrapper shares out or flattens parameters.
    """
    if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
        raise ValueError(
            'LayerAttentionPruningHook cannot prune in a '
            f'{type(model).__name__}, which shares out or flattens '
            'the parameters before they are pruned; train with '
            'MMDistributedDataParallel instead'
        )


def rewrap(runner) -> None:
    """Have distributed training no longer wait for pruned gradients.

    Communication hooks move on to the new wrapper, with their states.

    Args:
        runner (Runner): The runner; nothing happens without distributed
            training.
    """
    if not isinstance(runner.model, DistributedDataParallel):
        return
    module = runner.model.module
    comm_hooks = list(runner.model._comm_hooks)
    # The old reducer must go first, or both would reduce. A compiled
    # train_step refers to the wrapper that it belongs to.
    vars(runner.model).pop('train_step', None)
    runner.model = None
    if isinstance(runner, FlexibleRunner):
        runner.strategy.model = None
        gc.collect()
        runner.model = runner.strategy._wrap_model(module)
        runner.strategy.model = runner.model
    else:
        gc.collect()
        runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), module)
        runner._maybe_compile('train_step')
    for hook, state in comm_hooks:
        runner.model.register_comm_hook(state, hook)
