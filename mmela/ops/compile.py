"""``backend='compile'``: compile each attention separately with ``torch.compile``."""

import logging
from types import FunctionType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .layer_weighted_sum import needs_plain_code

# The compiler behind torch.compile
COMPILER = 'inductor'
# torch 2.0 cannot trace autograd functions
TOO_OLD = not hasattr(torch, 'compiler')
# Device types on which compiling has failed
_failed: List[str] = []


class CompiledForward:
    """Compiled forward pass of one layer attention.

    A graph is valid for one length of the lists in the memory, so after a pruning only
    the later attentions of that stage are compiled again. A second image size adds one
    more graph, which then works for all sizes.

    If compiling fails (no C++ compiler, no Triton, an unsupported torch or Python), the
    attention runs eagerly and one log line gives the reason. It also runs eagerly while
    hooks, tracing or a dispatch mode watch it, since a graph would bypass them, and
    while the whole network is being compiled or exported.

    It holds no reference to an attention, so copies, replicas and pickles need no
    special care; a copy is compiled again.
    """

    _lengths: Tuple[int, ...] = ()
    _function: Optional[Callable] = None

    def __getstate__(self) -> Dict[str, Any]:
        return {}

    def __call__(
        self, attention: nn.Module, eager: Callable, x: Tensor, memory: Any
    ) -> Tensor:
        """Run the forward pass.

        Args:
            attention (nn.Module): The attention.
            eager (callable): Function of ``x`` and ``memory`` that runs the attention
                eagerly, with its hooks.
            x (Tensor): Output of the block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, which is extended.

        Returns:
            Tensor: The retrieved features, (B, C, H, W).
        """
        device = x.device.type
        if device in ('meta', *_failed) or not can_compile() or _is_watched(attention):
            return eager(x, memory)
        lengths = tuple(len(v) for v in vars(memory).values() if isinstance(v, list))
        function = self._function
        if function is None or lengths != self._lengths:
            try:
                function = _compiled(type(attention).forward)
            except (ImportError, RuntimeError) as error:
                return self._give_up(device, error, eager, x, memory)
            self._function, self._lengths = function, lengths
        try:
            return function(attention, x, memory)
        except _compiler_error() as error:
            # Raised before anything ran, so the memory is unchanged
            return self._give_up(device, error, eager, x, memory)

    def _give_up(
        self, device: str, error: Exception, eager: Callable, x: Tensor, memory: Any
    ) -> Tensor:
        self._function = None
        _failed.append(device)
        reason = ' '.join(str(error).split())[:200]
        print_log(
            f"backend='compile' fails on {device!r}, so layer attention runs "
            f'eagerly there: {reason}',
            logger='current',
            level=logging.WARNING,
        )
        return eager(x, memory)


def can_compile() -> bool:
    """Whether a single module may be compiled now.

    Returns:
        bool: False while something records or intercepts operators, such as an
        export, a trace, a FLOP counter or ``torch.func``.
    """
    return not needs_plain_code() and not torch._C._len_torch_dispatch_stack()


def _is_watched(module: nn.Module) -> bool:
    """Whether a graph would bypass hooks, or the module is a replica."""
    return (
        getattr(module, '_is_replica', False)  # DataParallel runs it in a thread
        or 'forward' in vars(module)
        or any(
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            for m in module.modules()
        )
    )


def _compiled(forward: Any) -> Callable:
    """Compile a method independently of its other uses.

    ``torch.compile`` gives up after 8 graphs of one code object, so each attention gets
    its own code object.

    Raises:
        RuntimeError: If torch is too old.
    """
    if TOO_OLD:
        raise RuntimeError(f'torch {torch.__version__} is too old; 2.1 is needed')
    copy = FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    return torch.compile(copy, backend=COMPILER)


def _compiler_error() -> Type[Exception]:
    """The exception of a compiler that does not work here.

    Other exceptions must pass: they are errors of the run, and activation
    checkpointing ends its second forward pass with one.
    """
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
