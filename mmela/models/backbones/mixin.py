from typing import Any, Optional, Sequence

from ...attach import attach_layer_attention
from ...attach.families import LAYERS_PER_STAGE, known_stages


class LayerAttentionMixin:
    """A backbone with layer attention, as a class.

    Put it before the backbone in the bases of a class. The result is what
    ``type='mmela.WithLayerAttention'`` makes of that backbone: the same function
    attaches the attentions, the attention of a block is its submodule
    ``layer_attn``, and all other keys of the state dict stay those of the backbone.

    Args:
        *args: Positional arguments of the backbone.
        layer_attention (dict, optional): See
            :func:`mmela.attach_layer_attention`. Defaults to
            ``dict(type='MRLABase')``.
        blocks (str | Sequence): See :func:`mmela.attach_layer_attention`. That is
            how ``mmela slim`` writes a pruned network down. Defaults to ``'auto'``.
        attention_blocks (Sequence[Sequence[int]], optional): For each stage, the
            indices of the blocks that have an attention, from 0 and in order, as
            versions before 0.2 wrote slim networks. Defaults to None, which means
            what ``blocks`` says.
        reset_pruning (bool): See :func:`mmela.attach_layer_attention`. Defaults to
            False.
        input_size (tuple[int, int], optional): See
            :func:`mmela.attach_layer_attention`. Defaults to None.
        input_channels (int, optional): See :func:`mmela.attach_layer_attention`.
            Defaults to None.
        layers_per_stage (int): See :func:`mmela.attach_layer_attention`. Defaults
            to 4.
        **kwargs: Keyword arguments of the backbone.

    Raises:
        KeyError: If there is no layer attention of that ``type``.
        TypeError: If ``layer_attention`` is not a dict with a ``type``, or has an
            argument that is unknown or of another type.
        ValueError: If ``attention_blocks`` does not fit the stages, or as
            :func:`mmela.attach_layer_attention` does.
    """

    def __init__(
        self,
        *args,
        layer_attention: Optional[dict] = None,
        blocks: Any = 'auto',
        attention_blocks: Optional[Sequence[Sequence[int]]] = None,
        reset_pruning: bool = False,
        input_size: Any = None,
        input_channels: Optional[int] = None,
        layers_per_stage: int = LAYERS_PER_STAGE,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if attention_blocks is not None:
            blocks = self._names_of(attention_blocks, layers_per_stage)
        attach_layer_attention(
            self,
            layer_attention,
            blocks,
            reset_pruning,
            input_size,
            input_channels,
            layers_per_stage,
        )

    def _names_of(
        self, attention_blocks: Sequence[Sequence[int]], layers_per_stage: int
    ) -> list:
        """``blocks`` for the indices of blocks."""
        stages = known_stages(self, layers_per_stage) or []
        if len(attention_blocks) != len(stages):
            raise ValueError(
                f'attention_blocks={attention_blocks} is for {len(attention_blocks)} '
                f'stages, but the backbone has {len(stages)}'
            )
        named = []
        for number, (indices, stage) in enumerate(zip(attention_blocks, stages)):
            allowed = set(range(len(stage)))
            if list(indices) != sorted(set(indices)) or not set(indices) <= allowed:
                raise ValueError(
                    f'attention_blocks[{number}]={list(indices)} must name blocks of '
                    'the stage once each and in order; allowed are 0 to '
                    f'{len(stage) - 1}'
                )
            named.append(
                [
                    block.name if index in indices else f'!{block.name}'
                    for index, block in enumerate(stage)
                ]
            )
        return named
