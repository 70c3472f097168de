import functools
import gc

from mmengine.model import is_model_wrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..structure import layer_attentions
from .last_checkpoint import repair_last_checkpoint


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
    compiled = vars(runner.model).pop('train_step', None) is not None
    runner.model = None
    if isinstance(runner, FlexibleRunner):
        runner.strategy.model = None
        gc.collect()
        runner.model = runner.strategy._wrap_model(module)
        runner.strategy.model = runner.model
    else:
        gc.collect()
        runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), module)
        if compiled:
            runner._maybe_compile('train_step')
    for hook, state in comm_hooks:
        runner.model.register_comm_hook(state, hook)


def rewrap_after_loading() -> None:
    """Have mmengine's runners wrap a model again that they load as pruned.

    They wrap a model before they load it. So distributed training would wait
    for the gradients of what is pruned in the checkpoint, also where a config
    has no pruning hook: to fine-tune a pruned network must not need one.
    """
    for runner_class in (Runner, FlexibleRunner):
        runner_class.load_or_resume = _then_rewrap(runner_class.load_or_resume)
        runner_class.resume = _noted(runner_class.resume)


def _noted(resume):
    @functools.wraps(resume)
    def wrapped(runner, filename, *args, **kwargs):
        runner._mmela_resumed_from = filename
        resume(runner, filename, *args, **kwargs)

    return wrapped


def resumed_from(runner) -> str:
    """The checkpoint that a run was resumed from, for messages.

    Args:
        runner (Runner): The runner.

    Returns:
        str: Its path or address.
    """
    return str(getattr(runner, '_mmela_resumed_from', 'the checkpoint'))


def _then_rewrap(load_or_resume):
    @functools.wraps(load_or_resume)
    def wrapped(runner, *args, **kwargs):
        if runner._resume and runner._load_from is None and not runner._has_loaded:
            repair_last_checkpoint(runner)
        load_or_resume(runner, *args, **kwargs)
        if isinstance(runner.model, nn.Module) and any(
            not attention.active
            for attention in layer_attentions(runner.model).values()
        ):
            rewrap(runner)

    return wrapped
