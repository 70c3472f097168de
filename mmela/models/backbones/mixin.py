from typing import List, Optional, Sequence, Tuple

import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS

from ...layers import (
    AttentionState,
    HookedAttentionStage,
    LayerAttention,
    LayerAttentionStage,
)


class LayerAttentionArguments:
    """What the two mixins below share: arguments, and building an attention.

    Args:
        *args: Positional arguments of the backbone.
        layer_attention (dict): Config of the layer attention: ``MLA``,
            ``MRLABase``, ``MRLALight`` or ``KCLA``. ``channels`` is filled in;
            so is ``norm_cfg`` with that of the backbone, made trainable, where
            it is not given. Defaults to ``dict(type='MRLABase')``.
        attention_blocks (Sequence[Sequence[int]], optional): For each stage,
            the indices of the blocks that have an attention, from 0. That is
            how ``tools/convert/slim.py`` writes a pruned network down.
            Defaults to None, which means all blocks.
        reset_pruning (bool): Start with no attention pruned although the
            checkpoint of ``init_cfg`` is of a pruned network. A pruned
            attention then goes on with the weights that it had when it was
            pruned. Nothing else is reset: not by ``load_from``, not when a
            run is resumed and not when it is tested. Defaults to False.
        **kwargs: Keyword arguments of the backbone.

    Raises:
        TypeError: If ``layer_attention`` is not a dict with a ``type``.
        ValueError: If ``head_dim`` does not divide the channels of a block, or
            ``attention_blocks`` does not fit the stages.
    """

    def __init__(
        self,
        *args,
        layer_attention: Optional[dict] = None,
        attention_blocks: Optional[Sequence[Sequence[int]]] = None,
        reset_pruning: bool = False,
        **kwargs,
    ) -> None:
        if layer_attention is None:
            layer_attention = dict(type='MRLABase')
        if not isinstance(layer_attention, dict) or 'type' not in layer_attention:
            raise TypeError(
                'layer_attention must be a dict with a type such '
                f"as dict(type='MRLABase'), got {layer_attention}"
            )
        # The backbone's constructor builds its stages, which needs them.
        self.layer_attention = layer_attention
        self.attention_blocks = attention_blocks
        self.reset_pruning = reset_pruning
        super().__init__(*args, **kwargs)

    def init_weights(self) -> None:
        """Initialize the weights, or load those of ``init_cfg``."""
        super().init_weights()
        if self.reset_pruning:
            for module in self.modules():
                if isinstance(module, LayerAttention):
                    module.attention_state = AttentionState.ACTIVE

    def remaining_attention_blocks(self) -> List[List[int]]:
        """For each stage, the blocks whose attention is not pruned.

        Returns:
            list[list[int]]: What ``attention_blocks`` is in the same network
            without its pruned attentions.
        """
        return [
            [
                int(name)
                for name, block in stage.named_children()
                if hasattr(block, 'layer_attn')
                and block.layer_attn.attention_state != AttentionState.PRUNED
            ]
            for stage in self._stages()
        ]

    def _stages(self) -> Sequence[LayerAttentionStage]:
        raise NotImplementedError

    def _check_attention_blocks(self, num_stages: int) -> None:
        if (
            self.attention_blocks is not None
            and len(self.attention_blocks) != num_stages
        ):
            raise ValueError(
                f'attention_blocks={self.attention_blocks} is for '
                f'{len(self.attention_blocks)} stages, but the backbone has '
                f'{num_stages}'
            )

    def _blocks_with_attention(self, stage: int, depth: int) -> Sequence[int]:
        """Indices of the blocks of a stage that have an attention."""
        if self.attention_blocks is None:
            return range(depth)
        if stage >= len(self.attention_blocks):
            return ()  # reported when all stages are built
        blocks = self.attention_blocks[stage]
        if not set(blocks) <= set(range(depth)):
            raise ValueError(
                f'attention_blocks[{stage}]={blocks} names blocks that the '
                f'stage does not have; allowed are 0 to {depth - 1}'
            )
        return blocks

    def _attach(
        self,
        stage: LayerAttentionStage,
        blocks: Sequence[int],
        channels: Sequence[int],
        before: Optional[LayerAttentionStage] = None,
        stride: int = 1,
        shared_drop_path: bool = False,
        **kwargs,
    ) -> None:
        """Give blocks of a stage their attentions.

        Args:
            stage (LayerAttentionStage): The stage.
            blocks (Sequence[int]): Indices of the blocks.
            channels (Sequence[int]): Channels of this stage and of the one
                before.
            before (LayerAttentionStage, optional): The stage before.
            stride (int): Stride between the two.
            shared_drop_path (bool): Give an attention the stochastic depth of
                its block, one of ``stage.blocks`` (MRLA, appendix B.1).
            **kwargs: Defaults of the layer attention.
        """
        for index in blocks:
            if shared_drop_path:
                kwargs['drop_path'] = _drop_path(stage.blocks[index])
            crossing = {}
            # Not into a later block: where the first one is without attention,
            # as after pruning it, nothing is taken over.
            if index == 0 and before is not None and self._crosses_stages():
                crossing = dict(previous_channels=channels[1], stride=stride)
            attention = MODELS.build(
                {**kwargs, **self.layer_attention, 'channels': channels[0], **crossing}
            )
            stage.attach(index, attention)
            if crossing and attention.crosses_stages:
                stage.take_over_from(before)

    def _crosses_stages(self) -> bool:
        """Whether such attentions can take over another stage's memory."""
        cls = self.layer_attention['type']
        if isinstance(cls, str):
            cls = MODELS.get(cls)
        return getattr(cls, 'crosses_stages', False)

    def _attention_norm_cfg(self) -> dict:
        # Detectors with a frozen BN have requires_grad=False in norm_cfg. The
        # norm of the attention comes from no pre-trained network: it learns.
        norm_cfg = dict(self.norm_cfg)
        norm_cfg.pop('requires_grad', None)
        return norm_cfg


class LayerAttentionMixin(LayerAttentionArguments):
    """Attach a layer attention to each residual block of a toolbox's ResNet.

    For ResNet and what inherits from it. Put it before the backbone in the
    bases of a class. The attention of a block becomes its submodule
    ``layer_attn``; all other keys of the state dict stay those of the
    backbone.

    The arguments are those of :class:`LayerAttentionArguments`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._check_attention_blocks(len(self.res_layers))

    def _stages(self) -> Sequence[LayerAttentionStage]:
        return [getattr(self, name) for name in self.res_layers]

    def make_res_layer(self, **kwargs) -> LayerAttentionStage:
        """Build the blocks of a stage and attach their layer attentions."""
        stage = LayerAttentionStage(*super().make_res_layer(**kwargs))
        if 'out_channels' in kwargs:  # mmpretrain
            channels = kwargs['out_channels']
        else:  # mmdet
            channels = kwargs['planes'] * kwargs['block'].expansion
        before = previous_channels = None
        if self.res_layers:
            before = getattr(self, self.res_layers[-1])
            previous_channels = self._last_channels
        blocks = self._blocks_with_attention(len(self.res_layers), len(stage))
        self._attach(
            stage,
            blocks,
            (channels, previous_channels),
            before,
            kwargs['stride'],
            norm_cfg=self._attention_norm_cfg(),
        )
        self._last_channels = channels
        return stage


class HookedLayerAttentionMixin(LayerAttentionArguments):
    """Attach layer attentions to the blocks of any backbone, by hooks.

    Put it before the backbone in the bases of a class. The attentions live in
    ``layer_attn_stages.<stage>.<block>.layer_attn``; all other keys of the
    state dict stay those of the backbone. A subclass says in
    :meth:`attention_stages` which blocks form a stage.

    The arguments are those of :class:`LayerAttentionArguments`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        stages, last = [], None
        for index, spec in enumerate(self.attention_stages()):
            stage, channels, stride, defaults = spec
            blocks = self._blocks_with_attention(index, len(stage.blocks))
            self._attach(
                stage,
                blocks,
                (channels, last),
                stages[-1] if stages else None,
                stride,
                shared_drop_path=True,
                **defaults,
            )
            stages.append(stage)
            last = channels
        self.layer_attn_stages = nn.ModuleList(stages)
        self._check_attention_blocks(len(stages))
        for stage in stages:
            stage.freeze_with_blocks()

    def _stages(self) -> Sequence[LayerAttentionStage]:
        return self.layer_attn_stages

    def train(self, mode: bool = True):
        """Set the mode; the attentions of frozen blocks stay in eval mode."""
        super().train(mode)
        for stage in getattr(self, 'layer_attn_stages', ()):
            stage.freeze_with_blocks()
        return self

    def attention_stages(self) -> List[Tuple[HookedAttentionStage, int, int, dict]]:
        """The stages of the backbone.

        Returns:
            list[tuple]: For each stage the hooked stage, its channels, its
            stride against the stage before, and defaults of its layer
            attentions.
        """
        raise NotImplementedError


def _drop_path(block: nn.Module) -> float:
    """Probability of the stochastic depth of a block."""
    for module in block.modules():
        if isinstance(module, DropPath):
            return float(module.drop_prob)
    return 0.0
