from typing import Callable, Dict, List, Optional, Tuple

from mmengine.model import Sequential
from torch import Tensor, nn

from .base import LayerAttention, LayerMemory


class LayerAttentionStage(Sequential):
    """The residual blocks of one stage, each followed by its layer attention.

    A block carries its attention as ``layer_attn``; a block without one is a
    plain residual block.

    Attributes:
        observer (callable, optional): Called after each forward pass with the
            scores of the active attentions, a list of (B, G, t) tensors
            without gradient. Defaults to None, which costs nothing.
    """

    observer: Optional[Callable[[List[Tensor]], None]] = None

    def __init__(self, *blocks) -> None:
        super().__init__(*blocks)
        # In a tuple, so that it does not become a submodule
        self._before: Tuple['LayerAttentionStage', ...] = ()
        self._hands_over = False
        self._memory: Optional[LayerMemory] = None

    def take_over_from(self, stage: 'LayerAttentionStage') -> None:
        """Start with the memory that another stage has ended with.

        Args:
            stage (LayerAttentionStage): The stage that runs before this one.
        """
        self._before = (stage,)
        stage._hands_over = True

    def hand_over(self, x: Tensor) -> LayerMemory:
        """Give away the memory of the last forward pass.

        Args:
            x (Tensor): Input of the stage that takes it over.

        Returns:
            LayerMemory: The memory, which is forgotten here.

        Raises:
            RuntimeError: If there was no forward pass since the last call, or
                the memory has lost its gradient.
        """
        memory, self._memory = self._memory, None
        lost = (
            memory is not None
            and memory.mean is not None
            and x.requires_grad
            and not memory.mean.requires_grad
        )
        if memory is None or lost:
            what = 'has no gradient' if lost else 'is not there'
            raise RuntimeError(
                'the layer attention of a stage takes over the memory of the '
                f'stage before, which {what}. That is so where activation '
                'checkpointing runs whole stages; use with_cp=True, which '
                'checkpoints blocks, or cross_stage=False'
            )
        return memory

    @property
    def attentions(self) -> List[LayerAttention]:
        """list[LayerAttention]: The layer attentions of the blocks, in order;
        pruned ones too."""
        return [b.layer_attn for b in self if hasattr(b, 'layer_attn')]

    def named_attentions(self) -> Dict[str, LayerAttention]:
        """Layer attentions by name within the stage, pruned ones too.

        Returns:
            dict[str, LayerAttention]: In order, e.g. ``0.layer_attn``.
        """
        return {
            f'{name}.layer_attn': block.layer_attn
            for name, block in self.named_children()
            if hasattr(block, 'layer_attn')
        }

    def attach(self, index: int, attention: LayerAttention) -> None:
        """Give a block its layer attention.

        Args:
            index (int): Index of the block.
            attention (LayerAttention): Its attention.
        """
        block = self[index]
        block.layer_attn = attention
        downsample = getattr(block, 'downsample', None)
        if attention.needs_identity and downsample is not None:
            downsample.register_forward_hook(_keep_output)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order.

        Args:
            x (Tensor): Input of the stage, (B, C_in, H_in, W_in).

        Returns:
            Tensor: Output of the last block, (B, C, H, W).
        """
        memory = self._begin(x)
        for block in self:
            attention = getattr(block, 'layer_attn', None)
            if attention is not None and attention.active and attention.needs_identity:
                x, memory.identity = _run_with_identity(block, x)
            else:
                x = block(x)
            if attention is not None:
                x = attention(x, memory)
        self._end(memory)
        return x

    def _begin(self, x: Tensor) -> LayerMemory:
        """Memory of a new forward pass with the input ``x``."""
        memory = LayerMemory()
        if self._before:
            memory.previous = self._before[0].hand_over(x)
        return memory

    def _end(self, memory: LayerMemory) -> None:
        """Pass on what a forward pass has left in its memory."""
        if self.observer is not None:
            self.observer([scores.detach() for scores in memory.scores])
        if self._hands_over:
            self._memory = memory


def _run_with_identity(block: nn.Module, x: Tensor) -> Tuple[Tensor, Tensor]:
    """Run a residual block and get hold of its identity input.

    Args:
        block (nn.Module): A residual block of a toolbox.
        x (Tensor): Its input, (B, C_in, H_in, W_in).

    Returns:
        tuple[Tensor, Tensor]: Its output and the identity that it adds, ``x``
        after the downsample if it has one; each (B, C, H, W).
    """
    downsample = getattr(block, 'downsample', None)
    if downsample is None:
        return block(x), x
    # The toolboxes' blocks return no identity. To compute it here as well
    # would cost 9 % of a ResNet-50, so a hook keeps what the block computes.
    downsample.kept = None
    out = block(x)
    identity = downsample.kept
    del downsample.kept
    if identity is None or out.requires_grad and not identity.requires_grad:
        # No hook, or the block ran under reentrant checkpointing (`with_cp`),
        # which computes without gradients at first. Only here it is computed
        # once more.
        identity = downsample(x)
    return out, identity


def _keep_output(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Forward hook: keep the output with the module while one asks for it.

    A function of the module alone, so that copies of the network keep their
    own outputs, and nothing is kept after the forward pass, so that they can
    be made.
    """
    if hasattr(module, 'kept'):
        module.kept = output
