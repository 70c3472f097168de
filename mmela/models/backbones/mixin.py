from typing import Any, Optional, Sequence

from ...attach import attach_layer_attention
from ...attach.families import LAYERS_PER_STAGE


class LayerAttentionMixin:
    """Mixin that turns a backbone class into one with layer attention.

    Put it before the backbone in the bases of a class. The class then builds the same
    network as ``type='mmela.WithLayerAttention'`` with that backbone: each attention
    is the submodule ``layer_attn`` of its block, and all other keys of the state dict
    are those of the backbone.

    Args:
        *args: Positional arguments of the backbone.
        layer_attention (dict, optional): See
            :func:`mmela.attach_layer_attention`. Defaults to
            ``dict(type='MRLABase')``.
        blocks (str | Sequence): See :func:`mmela.attach_layer_attention`.
            ``mmela slim`` writes the blocks of a pruned network here. Defaults to
            ``'auto'``.
        attention_blocks (Sequence[Sequence[int]], optional): The name that versions
            before 0.2 had for ``blocks`` by index. Defaults to None.
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
        KeyError: If ``type`` is not a registered layer attention.
        TypeError: If ``layer_attention`` is not a dict with a ``type``, or if an
            argument in it is unknown or has the wrong type.
        ValueError: As in :func:`mmela.attach_layer_attention`.
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
        attach_layer_attention(
            self,
            layer_attention,
            blocks if attention_blocks is None else attention_blocks,
            reset_pruning,
            input_size,
            input_channels,
            layers_per_stage,
        )
