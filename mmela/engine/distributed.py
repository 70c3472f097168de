import functools
import gc

from mmengine.model import is_model_wrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..structure import layer_attentions
from .last_checkpoint import repair_last_checkpoint


def check_wrapper(model: nn.Module) -> None:
    """Check that the wrapper of a model allows pruning.

    Args:
        model (nn.Module): The model of a runner.

    Raises:
        ValueError: If the wrapper shards or flattens parameters.
    """
    if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f'LayerAttentionPruningHook cannot prune in a {type(model).__name__}, '
            'which shards or flattens parameters; train with '
            'MMDistributedDataParallel instead'
        )


def rewrap(runner) -> None:
    """Wrap the model again, so that distributed training ignores pruned parameters.

    Communication hooks move to the new wrapper, with their states.

    Args:
        runner (Runner): The runner. Without distributed training nothing happens.
    """
    if not isinstance(runner.model, DistributedDataParallel):
        return
    module = runner.model.module
    comm_hooks = list(runner.model._comm_hooks)
    # Delete the old wrapper first, or both would reduce gradients. A compiled
    # train_step holds a reference to it.
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
    """Make mmengine's runners wrap a model again after loading a pruned checkpoint.

    They wrap a model before they load it, so distributed training would wait for
    gradients of attentions that are pruned in the checkpoint. This also covers
    fine-tuning, where a config has no pruning hook.
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
    """Get the checkpoint that a run was resumed from, for messages.

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
