from typing import Optional, Sequence

import torch.nn as nn
from mmengine.registry import MODELS

from ...layers import LayerAttentionStage


class LayerAttentionMixin:
    """Attach a layer attention to each residual block of a toolbox's ResNet.

    Put it before the backbone in the bases of a class. The attention of a
    block becomes its submodule ``layer_attn``; all other keys of the state
    dict stay those of the backbone.

    Args:
        *args: Positional arguments of the backbone.
        layer_attention (dict): Config of the layer attention. ``channels`` is
            filled in; so is ``norm_cfg`` with that of the backbone, made
            trainable, where it is not given. Defaults to
            ``dict(type='MRLABase')``.
        attention_blocks (Sequence[Sequence[int]], optional): For each stage,
            the indices of the blocks that have an attention, from 0. That is
            how ``tools/convert/slim.py`` writes a pruned network down.
            Defaults to None, which means all blocks.
        **kwargs: Keyword arguments of the backbone.

    Raises:
        TypeError: If ``layer_attention`` is not a dict with a ``type``.
        ValueError: If ``head_dim`` does not divide the channels of a block, or
            ``attention_blocks`` does not fit the stages.
    """

    def __init__(self,
                 *args,
                 layer_attention: Optional[dict] = None,
                 attention_blocks: Optional[Sequence[Sequence[int]]] = None,
                 **kwargs) -> None:
        if layer_attention is None:
            layer_attention = dict(type='MRLABase')
        if not isinstance(layer_attention, dict) or \
                'type' not in layer_attention:
            raise TypeError('layer_attention must be a dict with a type such '
                            f"as dict(type='MRLABase'), got {layer_attention}")
        # The backbone's constructor calls make_res_layer, which needs them.
        self.layer_attention = layer_attention
        self.attention_blocks = attention_blocks
        super().__init__(*args, **kwargs)
        if attention_blocks is not None and \
                len(attention_blocks) != len(self.res_layers):
            raise ValueError(
                f'attention_blocks={attention_blocks} is for '
                f'{len(attention_blocks)} stages, but the backbone has '
                f'{len(self.res_layers)}')

    def make_res_layer(self, **kwargs) -> LayerAttentionStage:
        """Build the blocks of a stage and attach their layer attentions."""
        stage = LayerAttentionStage(*super().make_res_layer(**kwargs))
        if 'out_channels' in kwargs:  # mmpretrain
            channels = kwargs['out_channels']
        else:  # mmdet
            channels = kwargs['planes'] * kwargs['block'].expansion
        for index in self._attention_blocks(len(stage)):
            stage[index].layer_attn = self._build_layer_attention(channels)
        return stage

    def _attention_blocks(self, depth: int) -> Sequence[int]:
        """Blocks with an attention in the stage that is being built."""
        stage = len(self.res_layers)
        if self.attention_blocks is None:
            return range(depth)
        if stage >= len(self.attention_blocks):
            return ()  # reported when all stages are built
        blocks = self.attention_blocks[stage]
        if not set(blocks) <= set(range(depth)):
            raise ValueError(
                f'attention_blocks[{stage}]={blocks} names blocks that the '
                f'stage does not have; allowed are 0 to {depth - 1}')
        return blocks

    def _build_layer_attention(self, channels: int) -> nn.Module:
        # Detectors with a frozen BN have requires_grad=False in norm_cfg. The
        # norm of the attention comes from no pre-trained network: it learns.
        norm_cfg = dict(self.norm_cfg)
        norm_cfg.pop('requires_grad', None)
        return MODELS.build(
            {**dict(norm_cfg=norm_cfg), **self.layer_attention,
             'channels': channels})
