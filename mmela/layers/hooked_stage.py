from typing import Callable, Optional, Sequence, Tuple

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from .base import AttentionState, LayerAttention, LayerMemory
from .stage import LayerAttentionStage


class HookedAttentionStage(LayerAttentionStage):
    """Layer attentions of blocks that a backbone calls by itself.

    For backbones whose forward pass loops over blocks that are not a
    ``Sequential`` of one stage each, such as transformers. The blocks stay
    where the backbone has them, with their keys; this module holds their
    attentions as ``<block>.layer_attn`` and runs each from a forward hook.

    Args:
        blocks (Sequence[nn.Module]): The blocks of the stage, in order.

    Attributes:
        observer (callable, optional): As for :class:`LayerAttentionStage`.
        blocks (tuple[nn.Module]): The blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self._running: Optional[LayerMemory] = None
        # In a tuple, so that they do not become submodules
        self.blocks = tuple(blocks)
        for index, block in enumerate(blocks):
            block.register_forward_hook(_Hook(self, index))

    def attach(self, index: int, attention: LayerAttention) -> None:
        """Give a block its layer attention.

        Args:
            index (int): Index of the block.
            attention (LayerAttention): Its attention.
        """
        self.add_module(str(index), _Slot(attention))

    def run(self, index: int, args: tuple, output: Tensor) -> Tensor:
        """Run what follows a block.

        Args:
            index (int): Index of the block.
            args (tuple): Its arguments; the first is its input.
            output (Tensor): Its output.

        Returns:
            Tensor: The output with what its attention retrieves.
        """
        if index == 0:
            self._running = self._begin(args[0])
        slot = self._modules.get(str(index))
        if slot is not None:
            output = self.attend(slot, args, output, self._running)
        if index == len(self.blocks) - 1:
            memory, self._running = self._running, None
            self._end(memory)
        return output

    def attend(
        self, slot: '_Slot', args: tuple, output: Tensor, memory: LayerMemory
    ) -> Tensor:
        """Run the attention in a slot on (B, C, H, W) maps."""
        memory.identity = args[0]
        return slot.layer_attn(output, memory)

    def freeze_with_blocks(self) -> None:
        """Freeze the attentions of blocks that have no trainable parameter."""
        for name, slot in self.named_children():
            block = self.blocks[int(name)]
            if not any(p.requires_grad for p in block.parameters()):
                slot.eval()
                for param in slot.parameters():
                    param.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(
            'the backbone calls the blocks; their hooks run the attentions'
        )


class TokenAttentionStage(HookedAttentionStage):
    """Layer attentions of transformer layers (MRLA, algorithms 2 and 4).

    The patch tokens are normalized and attended over as a (B, C, H, W) map.
    Class and distillation tokens stay apart: what is added to them is their
    own normalized value.

    Args:
        blocks (Sequence[nn.Module]): The layers of the stage, in order; their
            input and output are tokens, (B, L, C).
        resolution (callable): Takes the arguments of a layer and returns
            height and width of the map.
        num_extra_tokens (int): Number of tokens that precede the patch tokens.
            Defaults to 0.
        norm_cfg (dict): Normalization of the tokens. Defaults to
            ``dict(type='LN', eps=1e-6)``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        resolution: Callable[[tuple], Tuple[int, int]],
        num_extra_tokens: int = 0,
        norm_cfg: dict = dict(type='LN', eps=1e-6),
    ) -> None:
        super().__init__(blocks)
        self.resolution = resolution
        self.num_extra_tokens = num_extra_tokens
        self.norm_cfg = norm_cfg

    def attach(self, index: int, attention: LayerAttention) -> None:
        # Within the attention, so that they are pruned with it
        channels = attention.channels
        attention.pre_norm = build_norm_layer(self.norm_cfg, channels)[1]
        if attention.needs_identity:
            attention.identity_norm = build_norm_layer(self.norm_cfg, channels)[1]
        super().attach(index, attention)
        # One draw for all tokens of a sample: the map is not dropped alone.
        self._modules[str(index)].drop_path = attention.drop_path
        attention.drop_path = nn.Identity()

    def attend(
        self, slot: '_Slot', args: tuple, output: Tensor, memory: LayerMemory
    ) -> Tensor:
        attention = slot.layer_attn
        if attention.attention_state == AttentionState.PRUNED:
            return output
        size = self.resolution(args)
        tokens = attention.pre_norm(output)
        x = self._to_map(tokens, size)
        if attention.attention_state == AttentionState.VALUE_ONLY:
            attention.store(x, memory)
            return output
        if attention.needs_identity:
            memory.identity = self._to_map(attention.identity_norm(args[0]), size)
        retrieved = attention.retrieve(x, memory).flatten(2).transpose(1, 2)
        extra = tokens[:, : self.num_extra_tokens]
        return output + slot.drop_path(torch.cat([extra, retrieved], dim=1))

    def _to_map(self, tokens: Tensor, size: Tuple[int, int]) -> Tensor:
        """(B, L, C) to (B, C, H, W), without the extra tokens."""
        patches = tokens[:, self.num_extra_tokens :]
        return patches.transpose(1, 2).unflatten(2, tuple(size))


class _Slot(nn.Module):
    """Holds the attention of a block."""

    def __init__(self, attention: LayerAttention) -> None:
        super().__init__()
        self.layer_attn = attention


class _Hook:
    """Forward hook of a block.

    An object and no closure, so that a copy of the backbone has hooks that
    point to its own stages.
    """

    def __init__(self, stage: HookedAttentionStage, index: int) -> None:
        self.stage = stage
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.stage.run(self.index, args, output)
