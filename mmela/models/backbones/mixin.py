from typing import Any, Optional, Sequence

from ...attach import attach_layer_attention
from ...attach.families import LAYERS_PER_STAGE


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
        attention_blocks (Sequence[Sequence[int]], optional): What versions before
            0.2 called ``blocks`` by index. Defaults to None.
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
        ValueError: As :func:`mmela.attach_layer_attention` does.
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
