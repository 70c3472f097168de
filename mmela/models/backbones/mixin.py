from typing import Any, List, Optional, Sequence, Tuple

from mmengine.logging import print_log
from torch import nn

from ...attach import (
    TOKEN_DEFAULTS,
    AttachedStages,
    attention_arguments,
    attention_norm_cfg,
    block_drop_path,
    check_layer_attention,
    freeze_stages,
    starts_from_plain,
)
from ...layers import (
    AttentionStage,
    AttentionState,
    HookedAttentionStage,
    LayerAttention,
    SequentialAttentionStage,
    forward_pass,
)
from ...layers.stages import is_frozen

__all__ = [
    'TOKEN_DEFAULTS',
    'HookedLayerAttentionMixin',
    'LayerAttentionArguments',
    'LayerAttentionMixin',
]


class LayerAttentionArguments:
    """What the two mixins share: arguments, and building an attention.

    Args:
        *args: Positional arguments of the backbone.
        layer_attention (dict): Config of the layer attention: ``MLA``,
            ``MRLABase``, ``MRLALight`` or ``KCLA``. ``channels`` is filled in;
            so is ``norm_cfg`` with that of the backbone, made trainable, where
            it is not given. With ``zero_init`` or ``small_init`` the blocks of
            stages that the backbone freezes get none: it would stay as it
            starts. (But for attentions whose memory crosses stages, which the
            next stage goes on with.) Defaults to ``dict(type='MRLABase')``.
        attention_blocks (Sequence[Sequence[int]], optional): For each stage,
            the indices of the blocks that have an attention, from 0 and in
            order. That is how ``tools/convert/slim.py`` writes a pruned
            network down. Defaults to None, which means all blocks.
        reset_pruning (bool): Start with no attention pruned although the
            checkpoint of ``init_cfg`` is of a pruned network. A pruned
            attention then goes on with the weights that it had when it was
            pruned. Nothing else is reset: not by ``load_from``, not when a
            run is resumed and not when it is tested. Defaults to False.
        **kwargs: Keyword arguments of the backbone.

    Raises:
        KeyError: If there is no layer attention of that ``type``.
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
        # The backbone's constructor builds its stages, which needs them.
        self.layer_attention, self._attention_class = check_layer_attention(
            layer_attention
        )
        self.attention_blocks = attention_blocks
        self.reset_pruning = reset_pruning
        self._stages_without: List[int] = []
        super().__init__(*args, **kwargs)
        if self._stages_without:
            print_log(
                f'{type(self).__name__}: no layer attention in frozen stage(s) '
                f'{", ".join(map(str, self._stages_without))}: it would never be '
                'trained',
                'current',
            )

    def forward(self, *args, **kwargs) -> Any:
        """As that of the backbone.

        Args:
            *args: As of the backbone.
            **kwargs: As of the backbone.

        Returns:
            Any: What the backbone returns.
        """
        with forward_pass():
            return super().forward(*args, **kwargs)

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
                int(name.split('.')[0])
                for name, attention in stage.named_attentions().items()
                if attention.attention_state != AttentionState.PRUNED
            ]
            for stage in self._stages()
        ]

    def _stages(self) -> Sequence[AttentionStage]:
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

    def _blocks_with_attention(
        self, index: int, depth: int, frozen: bool
    ) -> Sequence[int]:
        """Indices of the blocks of a stage that have an attention.

        Args:
            index (int): Index of the stage.
            depth (int): Number of its blocks.
            frozen (bool): Whether the backbone does not train it.
        """
        if self.attention_blocks is None:
            new = starts_from_plain(self.layer_attention)
            if frozen and new and not self._crosses_stages():
                self._stages_without.append(index + 1)
                return ()
            return range(depth)
        if index >= len(self.attention_blocks):
            return ()  # reported when all stages are built
        blocks = list(self.attention_blocks[index])
        if blocks != sorted(set(blocks)) or not set(blocks) <= set(range(depth)):
            raise ValueError(
                f'attention_blocks[{index}]={blocks} must name blocks of the stage '
                f'once each and in order; allowed are 0 to {depth - 1}'
            )
        return blocks

    def _crosses_stages(self) -> bool:
        """Whether attentions take over the memory of the stage before."""
        return self._attention_class.crosses_stages and self.layer_attention.get(
            'cross_stage', True
        )

    def _attach(
        self,
        stage: AttentionStage,
        index: int,
        blocks: Sequence[nn.Module],
        frozen: bool,
        channels: int,
        stride: int,
        before: Optional[Tuple[AttentionStage, int]],
        shared_drop_path: bool = False,
        **defaults,
    ) -> None:
        """Give the blocks of a stage their attentions.

        Args:
            stage (AttentionStage): The stage.
            index (int): Its index.
            blocks (Sequence[nn.Module]): Its blocks.
            frozen (bool): Whether the backbone does not train it.
            channels (int): Channels of its blocks.
            stride (int): Its stride against the stage before.
            before (tuple[AttentionStage, int], optional): The stage before and
                its channels.
            shared_drop_path (bool): Give an attention the stochastic depth of
                its block (MRLA, appendix B.1). Defaults to False.
            **defaults: Defaults of the layer attention.
        """
        inner = self._attention_class.before_sum
        if inner and 'token_norm_cfg' in defaults:
            raise ValueError(
                f'{self._attention_class.__name__} works on the residual branch of '
                'convolutional blocks; a transformer has none'
            )
        named = self._blocks_with_attention(index, len(blocks), frozen)
        first = {}
        for i in named:
            if shared_drop_path and not inner:
                defaults['drop_path'] = block_drop_path(blocks[i])
            crossing = dict(block=i) if self._attention_class.takes_block else {}
            if i == 0 and before is not None and self._crosses_stages():
                crossing.update(previous_channels=before[1], stride=stride)
                stage.take_over_from(before[0])
            arguments = {**defaults, **self.layer_attention, **crossing, **first}
            arguments = attention_arguments(arguments, frozen)
            attention = self._attention_class(channels, **arguments)
            stage.attach(i, attention)
            if attention.shared and not first:
                first = dict(first=attention)
        stage.left_out = index + 1 in self._stages_without

    def _attention_norm_cfg(self) -> dict:
        return attention_norm_cfg(self.norm_cfg)


class LayerAttentionMixin(LayerAttentionArguments):
    """Attach a layer attention to each residual block of a toolbox's ResNet.

    For ResNet and what inherits from it. Put it before the backbone in the
    bases of a class. The attention of a block becomes its submodule
    ``layer_attn``; all other keys of the state dict stay those of the
    backbone.

    The arguments are those of :class:`.LayerAttentionArguments`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._check_attention_blocks(len(self.res_layers))

    def _stages(self) -> Sequence[AttentionStage]:
        return [getattr(self, name) for name in self.res_layers]

    def make_res_layer(self, **kwargs) -> SequentialAttentionStage:
        """Build the blocks of a stage and attach their layer attentions."""
        stage = SequentialAttentionStage(*super().make_res_layer(**kwargs))
        if 'out_channels' in kwargs:  # mmpretrain
            channels = kwargs['out_channels']
        else:  # mmdet
            channels = kwargs['planes'] * kwargs['block'].expansion
        index = len(self.res_layers)
        before = None
        if index:
            before = getattr(self, self.res_layers[-1]), self._last_channels
        self._attach(
            stage,
            index,
            stage,
            index < self.frozen_stages,
            channels,
            kwargs['stride'],
            before,
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

    The arguments are those of :class:`.LayerAttentionArguments`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        freeze_stages(self)
        stages: List[HookedAttentionStage] = []
        before = None
        for index, spec in enumerate(self.attention_stages()):
            stage, channels, stride, defaults = spec
            self._attach(
                stage,
                index,
                stage.blocks,
                all(map(is_frozen, stage.blocks)),
                channels,
                stride,
                before,
                shared_drop_path=True,
                **defaults,
            )
            stages.append(stage)
            before = stage, channels
        self._check_attention_blocks(len(stages))
        self.layer_attn_stages = AttachedStages(stages)
        self.layer_attn_stages.train(self.training)

    def _stages(self) -> Sequence[AttentionStage]:
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
