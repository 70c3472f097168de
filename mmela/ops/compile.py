"""``backend='compile'``: attentions that ``torch.compile`` fuses, each by itself."""

import logging
from types import FunctionType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .layer_weighted_sum import is_compiling

# The compiler behind torch.compile
COMPILER = 'inductor'
# torch 2.0 traces no autograd functions
TOO_OLD = not hasattr(torch, 'compiler')
# Types of devices that it has failed on
_failed: List[str] = []


class CompiledForward:
    """Forward pass of a layer attention, compiled apart from the network's.

    A graph holds for one length of the lists in the memory. So a pruning decision has
    the later attentions of a stage compiled once more, and no others. Images of another
    size are one more graph, which is for all sizes.

    Where nothing can be compiled (no C++ compiler, no Triton, a torch or a Python that
    ``torch.compile`` does not know), the attention runs eagerly, and one line in the
    log says why. It also does while something watches it (hooks, tracing, a
    dispatch mode), which a graph would pass by, and within a network that is being
    compiled or exported as a whole, whose graph it is then part of.

    It keeps no reference to an attention, so copies of one, replicas and pickles need
    nothing special; a copy is compiled anew.
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
            eager (callable): Runs it eagerly, hooks included; takes ``x`` and
                ``memory``.
            x (Tensor): Output of the block, (B, C, H, W).
            memory (StageMemory): Memory of the stage, which is extended.

        Returns:
            Tensor: What is retrieved, (B, C, H, W).
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
            # Raised before anything has run, so the memory is what it was
            return self._give_up(device, error, eager, x, memory)

    def _give_up(
        self, device: str, error: Exception, eager: Callable, x: Tensor, memory: Any
    ) -> Tensor:
        self._function = None
        _failed.append(device)
        reason = ' '.join(str(error).split())[:200]
        print_log(
            f"backend='compile' cannot compile for {device!r}, so layer attention "
            f'runs eagerly: {reason}',
            logger='current',
            level=logging.WARNING,
        )
        return eager(x, memory)


def can_compile() -> bool:
    """Whether a module may be compiled by itself at this moment.

    Returns:
        bool: False while something records or intercepts operators, such as an
        export, a trace, a FLOP counter, or ``torch.func``.
    """
    return (
        not is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks would be passed by, or the module is not its own."""
    return (
        getattr(module, '_is_replica', False)  # of DataParallel, in a thread
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
    """A method compiled apart from all other uses of it.

    ``torch.compile`` counts the graphs of a code object and gives up after 8, so each
    attention gets a code object of its own.

    Raises:
        RuntimeError: If torch cannot compile here.
    """
    if TOO_OLD:
        raise RuntimeError(f'torch {torch.__version__} is too old, 2.1 is needed')
    own = FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    return torch.compile(own, backend=COMPILER)


def _compiler_error() -> Type[Exception]:
    """What a compiler raises that does not work here.

    Nothing else is caught: an error of a run counts, and activation checkpointing
    ends its second forward pass by an exception.
    """
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
