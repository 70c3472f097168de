"""Self-attention of one patch in a vision transformer."""

import copy
import math
from functools import partial
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn


class PatchSize:
    """Records the height and width of the patch map in each forward pass.

    Args:
        backbone (nn.Module): A vision transformer of MMPretrain.
    """

    def __init__(self, backbone: nn.Module) -> None:
        with_token = getattr(backbone, 'with_cls_token', True)
        self.extra = backbone.num_extra_tokens if with_token else 0
        self.size: Optional[Tuple[int, int]] = None
        self._handle = backbone.patch_embed.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self.size = tuple(map(int, output[1]))

    def to_map(self, tokens: Tensor) -> Tensor:
        """Convert tokens, (B, L, C), to a map, (B, C, H, W), without extra tokens."""
        return tokens[:, self.extra :].transpose(1, 2).unflatten(2, self.size)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


class PatchLook(NamedTuple):
    """Attention weights of one patch in one layer.

    Attributes:
        weights (ndarray): Attention weights of the patches, (G, h, w).
        extra (ndarray): Total weight of extra tokens such as the class token, (G, ).
        patch (tuple[int, int]): Row and column of the querying patch.
    """

    weights: np.ndarray
    extra: np.ndarray
    patch: Tuple[int, int]


def is_transformer(backbone: nn.Module) -> bool:
    """Whether a backbone is a vision transformer of MMPretrain, such as DeiT."""
    return all(
        hasattr(backbone, name)
        for name in ('layers', 'patch_embed', 'num_extra_tokens', 'embed_dims')
    )


def layer_names(backbone: nn.Module) -> List[str]:
    """Names of the layers of a vision transformer.

    Raises:
        ValueError: If the backbone is not a vision transformer of MMPretrain.
    """
    if not is_transformer(backbone):
        raise ValueError(
            f'{type(backbone).__name__} is not a vision transformer of MMPretrain, '
            'such as DeiT, so it has no self-attention between patches'
        )
    return [f'layers.{i}' for i in range(len(backbone.layers))]


@torch.no_grad()
def patch_attention(
    model: nn.Module, batch: dict, layers: Sequence[str], query: Sequence[float]
) -> Dict[str, PatchLook]:
    """Measure the attention weights of one patch (MRLA, figure 7).

    Args:
        model (nn.Module): A model with a vision transformer of MMPretrain.
        batch (dict): The image as a batch of one, from the test pipeline.
        layers (Sequence[str]): Names of layers, such as ``layers.11``.
        query (Sequence[float]): Position of the patch, as fractions from 0 to 1 of the
            image's width and height.

    Returns:
        dict[str, PatchLook]: The weights by layer.

    Raises:
        ValueError: If the backbone is not such a transformer, a layer is unknown, or
            ``query`` is out of range.
    """
    if len(query) != 2 or not all(0 <= x <= 1 for x in query):
        raise ValueError(
            f'the query {" ".join(map(str, query))} is outside the image; give two '
            'fractions from 0 to 1, of its width and of its height'
        )
    backbone = getattr(model, 'backbone', model)
    names = layer_names(backbone)
    for name in layers:
        if name not in names:
            raise ValueError(
                f'the backbone has no layer {name}; allowed are {", ".join(names)}'
            )
        attention = getattr(backbone.get_submodule(name), 'attn', None)
        if not (hasattr(attention, 'qkv') and hasattr(attention, 'num_heads')):
            raise ValueError(
                f'{name} has no self-attention with query, key and value in one linear '
                'layer, as in MMPretrain'
            )
    outputs: Dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[name] = output

    size = PatchSize(backbone)
    handles = [size]
    for name in layers:
        qkv = backbone.get_submodule(name).attn.qkv
        handles.append(qkv.register_forward_hook(partial(keep, name)))
    model.eval()
    try:
        model(model.data_preprocessor(copy.deepcopy(batch), False)['inputs'])
    finally:
        for handle in handles:
            handle.remove()
    rows, columns = size.size
    row, column = (min(int(x * n), n - 1) for x, n in zip(query[::-1], size.size))
    looks = {}
    for name in layers:
        heads = backbone.get_submodule(name).attn.num_heads
        queries, keys = (
            outputs[name][0].float().unflatten(-1, (3, heads, -1)).unbind(1)[:2]
        )
        patch = queries[size.extra + row * columns + column]  # (G, d)
        scores = torch.einsum('gd,lgd->gl', patch, keys) / math.sqrt(keys.shape[-1])
        weights = scores.softmax(-1).cpu()
        looks[name] = PatchLook(
            weights[:, size.extra :].unflatten(1, (rows, columns)).numpy(),
            weights[:, : size.extra].sum(1).numpy(),
            (row, column),
        )
    return looks
