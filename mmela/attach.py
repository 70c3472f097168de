"""Give any network layer attentions."""

import inspect
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import ModuleList
from torch import Tensor, nn

from .discovery import (
    Block,
    Blocks,
    find_blocks,
    find_plain_blocks,
    group,
    name_blocks,
    name_matches,
    same_features,
    watch,
)
from .layers import (
    AttentionState,
    HookedAttentionStage,
    LayerAttention,
    TokenAttentionStage,
)
from .layers.stages import enter_pass, is_frozen, leave_pass
from .registry import LAYER_ATTENTIONS, find_layer_attention

TOKEN_DEFAULTS = dict(
    norm_cfg=None,
    value_act_cfg=dict(type='GELU'),
    token_norm_cfg=dict(type='LN', eps=1e-6),
)
"""dict: Defaults of the attentions of transformer layers."""

NORMS_OF_MAPS = ('BN', 'BN2d', 'SyncBN', 'MMSyncBN', 'GN')
"""tuple[str]: Normalizations that attentions on maps take over."""

TOKEN_STAGE_DEPTH = 4
"""int: Layers of a stage of a transformer that has no stages (MRLA, B.1)."""


class AttachedStages(ModuleList):
    """Hooked stages, as a module of their backbone.

    Args:
        stages (Sequence[HookedAttentionStage]): The stages.

    Attributes:
        loaded (bool): Whether a checkpoint with their attentions was loaded.
    """

    def __init__(self, stages: Sequence[HookedAttentionStage]) -> None:
        super().__init__(stages)
        self.loaded = False

    def attentions(self) -> List[LayerAttention]:
        """list[LayerAttention]: The attentions of all stages."""
        return [attention for stage in self for attention in stage.attentions]

    def init_weights(self) -> None:
        """Initialize the attentions, after what a parent did by type."""
        for attention in self.attentions():
            attention.init_weights()

    def train(self, mode: bool = True) -> 'AttachedStages':
        """Set the mode; the attentions of frozen blocks stay in eval mode."""
        super().train(mode)
        for stage in self:
            stage.freeze_with_blocks()
        return self

    def remaining_blocks(self) -> List[List[str]]:
        """For each stage, the blocks whose attention is not pruned.

        Returns:
            list[list[str]]: What ``blocks`` is in the same network without its
            pruned attentions. A first block whose attention would take over
            the memory of the stage before keeps its place, with a ``'!'``.
        """
        remaining = []
        for stage in self:
            names = []
            for index, name in enumerate(stage.names):
                attention = stage.attention_of(index)
                state = getattr(attention, 'attention_state', AttentionState.PRUNED)
                if state != AttentionState.PRUNED:
                    names.append(name)
                elif index == 0:
                    names.append(f'!{name}')
            remaining.append(names)
        return remaining

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.loaded |= any(key.startswith(prefix) for key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


def attach_layer_attention(
    backbone: nn.Module,
    layer_attention: Optional[dict] = None,
    blocks: Blocks = 'auto',
    reset_pruning: bool = False,
    input_size: Optional[Tuple[int, int]] = None,
) -> nn.Module:
    """Give the blocks of any network layer attentions, in place.

    The keys of the network stay as they are; the attentions come beside them
    in ``layer_attn_stages.<stage>.<block>.layer_attn``. What was attached is
    printed as a table. The network runs once, to see the features of its
    blocks.

    Args:
        backbone (nn.Module): A network that takes images, (B, 3, H, W).
        layer_attention (dict, optional): Config of the layer attention:
            ``MLA``, ``MRLABase``, ``MRLALight`` or ``KCLA``. What is not given
            follows the blocks: ``channels``; ``head_dim``, the largest up to
            32 that divides them; ``drop_path``, that of the block;
            ``norm_cfg``, that of the backbone, for maps (B, C, H, W), and a
            layer norm before the attention and a GELU for transformers. With
            ``zero_init`` or ``small_init`` the blocks of stages that the
            backbone freezes get none: it would stay as it starts.
            Defaults to ``dict(type='MRLABase')``.
        blocks (str | Sequence): ``'auto'`` finds the residual blocks, and
            puts consecutive ones of one width and resolution into stages; a
            transformer without stages gets stages of four. Or names or
            patterns such as ``'layers.*'``, of which stages are formed in the
            same way, or a list of names for each stage. Defaults to
            ``'auto'``.
        reset_pruning (bool): Start with no attention pruned although the
            checkpoint of the backbone's ``init_cfg`` is of a pruned network.
            Defaults to False.
        input_size (tuple[int, int], optional): Height and width of the input
            for that run. Defaults to None: the size that the network is made
            for, or else sizes from 224 on.

    Returns:
        nn.Module: The backbone.

    Raises:
        KeyError: If there is no layer attention of that ``type``.
        TypeError: If ``layer_attention`` is not a dict with a ``type``.
        ValueError: If the layer attention works within the blocks of ResNets
            alone, the network is an ``nn.Sequential`` or has layer attentions
            already, no block of it fits, ``blocks`` is or names
            none, or ``head_dim`` does not divide the channels of a block.

    Example:
        >>> import torch, torchvision
        >>> import mmela
        >>> net = torchvision.models.mobilenet_v2()
        >>> net = mmela.attach_layer_attention(net, dict(type='MRLABase'))
        >>> net(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    arguments, attention_class = check_layer_attention(layer_attention)
    if attention_class.before_sum:
        raise ValueError(
            f'{attention_class.__name__} works within the residual blocks of ResNets '
            'and their relatives, which have classes of their own: ELAResNet'
        )
    if any(isinstance(module, LayerAttention) for module in backbone.modules()):
        raise ValueError(f'{type(backbone).__name__} has layer attentions already')
    if isinstance(backbone, nn.Sequential):
        raise ValueError(
            'an nn.Sequential would run its attentions as one of its layers; make '
            'it part of a module whose forward() calls it, and give that one'
        )
    freeze_stages(backbone)
    found, without = _find_stages(backbone, blocks, input_size)
    if attention_class.crosses_stages:
        arguments.setdefault('cross_stage', True)
    crosses = arguments.get('cross_stage', False)
    new = starts_from_plain(arguments)
    stages: List[HookedAttentionStage] = []
    rows = []
    for members in found:
        stage = _make_stage(members)
        before = (stages[-1], found[len(stages) - 1]) if stages else None
        frozen = all(is_frozen(block.module) for block in members)
        stage.left_out = bool(frozen and new and not crosses and members)
        for index, block in enumerate(members):
            if stage.left_out or block.name in without:
                continue
            if _lacks_identity(attention_class, arguments, block):
                if blocks != 'auto':
                    raise ValueError(
                        f'blocks: {block.name} takes an input of another shape than '
                        f'its output, {block.shape}, so {attention_class.__name__} '
                        "has no identity there; leave it out, or use previous='output'"
                    )
                continue
            own = {**_defaults(backbone, block), **arguments}
            if index == 0 and crosses and before is not None:
                crossing = _crossing(before[1], block, own['head_dim'])
                if crossing:
                    stage.take_over_from(before[0])
                own.update(crossing)
            if attention_class.takes_block:
                own['block'] = index
            own = attention_arguments(own, frozen)
            stage.attach(index, attention_class(block.channels, **own))
        rows.append(_row(len(stages), members, stage))
        stages.append(stage)
    slim = bool(without) and not isinstance(blocks[0], str)
    if not slim and not any(stage.attentions or stage.left_out for stage in stages):
        raise ValueError(f'blocks={blocks} leaves no block with a layer attention')
    attached = AttachedStages(stages)
    parameter = next(iter(backbone.parameters()), torch.empty(0))
    attached.to(parameter.device)
    attached.train(backbone.training)
    backbone.layer_attn_stages = attached
    backbone.register_forward_pre_hook(enter_pass)
    backbone.register_forward_hook(leave_pass, always_call=True)
    if hasattr(backbone, 'init_weights'):
        backbone.init_weights = _InitWeights(backbone, reset_pruning)
    name = type(backbone).__name__
    print_log(f'Layer attention of {name}:\n' + _table(rows), 'current')
    return backbone


@LAYER_ATTENTIONS.register_module(name='WithLayerAttention')
def with_layer_attention(backbone: Any, **kwargs) -> nn.Module:
    """A backbone of any toolbox with layer attention, for configs.

    ``type='mmela.WithLayerAttention'``. What is built is the backbone itself,
    with its keys, attributes and methods.

    Args:
        backbone (dict): Config of the backbone.
        **kwargs: ``layer_attention``, ``blocks``, ``reset_pruning`` and
            ``input_size`` of :func:`attach_layer_attention`; ``init_cfg``
            takes the place of that of the backbone.

    Returns:
        nn.Module: The backbone.

    Raises:
        KeyError: If there is no such backbone or layer attention.
        TypeError: If ``backbone`` is no config of a module.
        ValueError: As :func:`attach_layer_attention` does.
    """
    from mmengine.registry import MODELS

    if not isinstance(backbone, dict) or 'type' not in backbone:
        raise TypeError(
            'WithLayerAttention needs the config of a backbone such as '
            f"backbone=dict(type='SwinTransformer'), got {backbone!r}"
        )
    if 'init_cfg' in kwargs:  # what tools set to None before they load weights
        backbone = {**backbone, 'init_cfg': kwargs.pop('init_cfg')}
    return attach_layer_attention(MODELS.build(backbone), **kwargs)


def check_layer_attention(layer_attention: Optional[dict]) -> Tuple[dict, type]:
    """Arguments and class of a layer attention.

    Args:
        layer_attention (dict, optional): Its config; None for ``MRLABase``.

    Returns:
        tuple[dict, type]: Its arguments and its class.

    Raises:
        KeyError: If there is no layer attention of that ``type``.
        TypeError: If it is not a dict with a ``type``.
    """
    if layer_attention is None:
        layer_attention = dict(type='MRLABase')
    if not isinstance(layer_attention, dict) or 'type' not in layer_attention:
        raise TypeError(
            'layer_attention must be a dict with a type such '
            f"as dict(type='MRLABase'), got {layer_attention}"
        )
    arguments = dict(layer_attention)
    return arguments, find_layer_attention(arguments.pop('type'))


def starts_from_plain(arguments: dict) -> bool:
    """Whether attentions are for a network that starts from plain weights.

    Args:
        arguments (dict): Their arguments.

    Returns:
        bool: Whether ``zero_init`` or ``small_init`` is set. In a stage that
        is frozen they would stay as they start.
    """
    return bool(arguments.get('zero_init')) or arguments.get('small_init') is not None


def attention_arguments(arguments: dict, frozen: bool) -> dict:
    """Arguments of an attention of a block that may be frozen.

    Args:
        arguments (dict): Those of the attentions of the network.
        frozen (bool): Whether the block is.

    Returns:
        dict: The same, or with ``zero_init`` for ``small_init`` in a frozen
        block: there it is for the next stage alone, which goes on with it.
    """
    if not frozen or arguments.get('small_init') is None:
        return arguments
    return {**arguments, 'small_init': None, 'zero_init': True}


def freeze_stages(backbone: nn.Module) -> None:
    """Freeze the stages of a toolbox's backbone that are to be frozen.

    Some freeze no sooner than in ``train()``.

    Args:
        backbone (nn.Module): The backbone.
    """
    # Vision transformers ask before they call it, and not in it.
    if getattr(backbone, 'frozen_stages', -1) > 0:
        freeze = getattr(backbone, '_freeze_stages', None)
        if freeze is not None:
            freeze()


class _InitWeights:
    """``init_weights`` of a backbone that leaves its attentions alone.

    Many initialize by type of module, attentions included; others know only
    their own modules.
    """

    def __init__(self, backbone: nn.Module, reset_pruning: bool) -> None:
        self.original = backbone.init_weights
        self.backbone = (backbone,)
        self.reset_pruning = reset_pruning

    def __call__(self, *args, **kwargs) -> Any:
        attached = self.backbone[0].layer_attn_stages
        attached.loaded = False
        result = self.original(*args, **kwargs)
        if not attached.loaded:
            attached.init_weights()
        if self.reset_pruning:
            for attention in attached.attentions():
                attention.attention_state = AttentionState.ACTIVE
        return result


def _find_stages(
    backbone: nn.Module, blocks: Blocks, input_size: Optional[Tuple[int, int]]
) -> Tuple[List[List[Block]], set]:
    """Stages, and names of the blocks in them that get no attention."""
    batch = 2
    calls, size = _try_sizes(backbone, batch, input_size)
    if isinstance(blocks, str) and blocks == 'auto':
        found = find_blocks(calls, batch, size)
        stages = group(found or find_plain_blocks(calls, batch, size))
        if not stages:
            ran = ', '.join(sorted({type(c.module).__name__ for c in calls if c.name}))
            raise ValueError(
                f'no blocks of {type(backbone).__name__} were found that add to their '
                'input, or are of one kind and follow each other, and return maps '
                '(B, C, H, W) or (B, H, W, C) or tokens (B, L, C), '
                f'among {len(calls)} calls of {ran}. Name the blocks: '
                "blocks=['layer1.*', 'layer2.*'] or a list of names for each stage"
            )
        if len({(s[0].layout == 'BCHW', s[0].size) for s in stages}) == 1:
            if stages[0][0].layout != 'BCHW':
                stages = [part for layers in stages for part in _parts(layers)]
        return stages, set()
    _check_form(blocks)
    nested = [entry for entry in blocks if not isinstance(entry, str)]
    without = {n[1:] for n in _flat(blocks) if n.startswith('!')}
    patterns = [name[name.startswith('!') :] for name in _flat(blocks)]
    named = name_blocks(calls, patterns, batch, size)
    if not nested:
        return group(named), without
    stages = []
    for number, entry in enumerate(blocks):
        patterns = [name[name.startswith('!') :] for name in entry]
        members = [
            block
            for block in named
            if any(name_matches(pattern, block.name) for pattern in patterns)
        ]
        for block in members[1:]:
            if not same_features(members[0], block):
                raise ValueError(
                    f'blocks[{number}]: {members[0].name} returns '
                    f'{members[0].shape} and {block.name} {block.shape}, but the '
                    'blocks of a stage have one width and resolution'
                )
        stages.append(members)
    return stages, without


def _parts(layers: List[Block]) -> List[List[Block]]:
    step = TOKEN_STAGE_DEPTH
    return [layers[i : i + step] for i in range(0, len(layers), step)]


def _flat(blocks: Blocks) -> List[str]:
    return [
        name
        for entry in blocks
        for name in ([entry] if isinstance(entry, str) else entry)
    ]


def _check_form(blocks: Any) -> None:
    form = "'auto', a list of names or patterns, or a list of such a list per stage"
    if isinstance(blocks, str) or not isinstance(blocks, (list, tuple)):
        raise ValueError(f'blocks={blocks!r} is not {form}')
    flat = [isinstance(entry, str) for entry in blocks]
    inner = [n for e in blocks if isinstance(e, (list, tuple)) for n in e]
    if (
        not blocks
        or any(flat) != all(flat)
        or not all(isinstance(name, str) for name in inner)
        or not all(isinstance(e, (str, list, tuple)) for e in blocks)
    ):
        raise ValueError(f'blocks={blocks!r} is not {form}')
    names = _flat(blocks)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'blocks={blocks!r} has {twice[0]!r} more than once')


def _try_sizes(
    backbone: nn.Module, batch: int, input_size: Optional[Tuple[int, int]]
) -> Tuple[list, Tuple[int, int]]:
    """Calls of the backbone's modules, at the first size that it takes."""
    sizes = [tuple(input_size)] if input_size else sizes_to_try(backbone)
    parameter = next(iter(backbone.parameters()), torch.empty(0))
    reason: Optional[Exception] = None
    for size in sizes:
        x = _image(batch, size, parameter)
        try:
            return watch(backbone, x, *other_arguments(backbone)), size
        except Exception as error:  # of any kind: it is somebody else's code
            reason = reason or error
    raise ValueError(
        f'{type(backbone).__name__} runs with images of none of the sizes '
        f'{sizes}: {reason}; give input_size=(height, width)'
    ) from reason


def other_arguments(backbone: nn.Module) -> List[None]:
    """What a network needs besides its image: None for each, such as a mask.

    Args:
        backbone (nn.Module): A network that takes images.

    Returns:
        list[None]: One for each further argument that has no default.
    """
    parameters = list(inspect.signature(backbone.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY,)
    positional += (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    needed = [
        parameter
        for parameter in parameters[1:]
        if parameter.kind in positional and parameter.default is parameter.empty
    ]
    return [None] * len(needed)


def _image(batch: int, size: Tuple[int, int], like: Tensor) -> Tensor:
    shape = (batch, 3, *size)
    if like.device.type == 'meta':
        return torch.empty(shape, device='meta', dtype=like.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return x.to(like.device, like.dtype if like.is_floating_point() else None)


def sizes_to_try(backbone: nn.Module) -> List[Tuple[int, int]]:
    """The size that a network says it is for, or sizes that many take.

    Args:
        backbone (nn.Module): A network that takes images.

    Returns:
        list[tuple[int, int]]: Heights and widths.
    """
    for module in backbone.modules():
        for name in ('img_size', 'input_size', 'pretrained_cfg', 'default_cfg'):
            size = getattr(module, name, None)
            if isinstance(size, dict):
                # timm's; of a network that takes no other size
                fixed = size.get('fixed_input_size')
                size = size.get('input_size') if fixed else None
                size = size[-2:] if size else None
            if isinstance(size, int) and not isinstance(size, bool):
                size = (size, size)
            if isinstance(size, (tuple, list)) and len(size) == 2:
                if all(isinstance(n, int) and n >= 16 for n in size):
                    return [tuple(size), (224, 224)]
    # Not square, as then height and width tell the axes of a map
    return [(224, 256), (224, 224), (256, 256), (384, 384), (512, 512), (32, 32)]


def _make_stage(members: List[Block]) -> HookedAttentionStage:
    modules = [block.module for block in members]
    names = [block.name for block in members]
    if members and members[0].layout != 'BCHW':
        resolution = members[0].resolution
        if resolution is not None:
            resolution.watch()
        return TokenAttentionStage(modules, resolution, members[0].extra, names=names)
    shortcuts = {i: b.shortcut for i, b in enumerate(members) if b.shortcut is not None}
    return HookedAttentionStage(modules, names, shortcuts)


def _defaults(backbone: nn.Module, block: Block) -> Dict[str, Any]:
    """Arguments of an attention that follow its block."""
    head_dim = max(d for d in range(1, 33) if block.channels % d == 0)
    common = dict(head_dim=head_dim, drop_path=block_drop_path(block.module))
    if block.layout != 'BCHW':
        return dict(TOKEN_DEFAULTS, **common)
    norm_cfg = getattr(backbone, 'norm_cfg', None)
    known = isinstance(norm_cfg, dict) and norm_cfg.get('type') in NORMS_OF_MAPS
    norm_cfg = attention_norm_cfg(norm_cfg) if known else dict(type='BN')
    return dict(common, norm_cfg=norm_cfg)


def attention_norm_cfg(norm_cfg: dict) -> dict:
    """Normalization of attentions: that of the backbone, made trainable.

    Args:
        norm_cfg (dict): That of the backbone.

    Returns:
        dict: A copy without ``requires_grad``.
    """
    # Detectors with a frozen BN have requires_grad=False in norm_cfg. The
    # norm of the attention comes from no pre-trained network: it learns.
    return {k: v for k, v in norm_cfg.items() if k != 'requires_grad'}


def block_drop_path(block: nn.Module) -> float:
    """Probability of the stochastic depth of a block.

    Args:
        block (nn.Module): A block of a toolbox, timm or torchvision.

    Returns:
        float: 0 if it has none.
    """
    for module in block.modules():
        kind = type(module).__name__
        if kind in ('DropPath', 'StochasticDepth'):
            value = getattr(module, 'drop_prob', getattr(module, 'p', None))
            return float(value or 0.0)
    return 0.0


def _lacks_identity(attention_class: type, arguments: dict, block: Block) -> bool:
    """Whether an attention needs an identity that its block does not have."""
    if block.same_input or block.shortcut is not None:
        return False
    return attention_class.would_need_identity(arguments)


def _crossing(before: List[Block], block: Block, head_dim: int) -> dict:
    """Arguments of an attention that takes over from the stage before."""
    heads = block.channels // head_dim
    if not before or not block.follows or not heads or before[-1].channels % heads:
        return {}
    stride = max(1, round(before[-1].size[0] / block.size[0]))
    if tuple(-(-n // stride) for n in before[-1].size) != tuple(block.size):
        return {}
    return dict(previous_channels=before[-1].channels, stride=stride)


def _row(number: int, members: List[Block], stage: HookedAttentionStage) -> tuple:
    attended = [
        name for i, name in enumerate(stage.names) if stage.attention_of(i) is not None
    ]
    first = members[0] if members else None
    if first is None:
        return (str(number), *[''] * 6)
    names = ', '.join(attended) if len(attended) < 3 else ''
    names = names or (f'{attended[0]} ... {attended[-1]}' if attended else 'none')
    if stage.left_out:
        names = f'none: {first.name} ... {members[-1].name} are frozen'
    height, width = first.size
    what = f'{height}x{width}, {first.layout}'
    if first.extra:
        what += f', {first.extra} more'
    heads = {a.head_dim for a in stage.attentions}
    return (
        str(number),
        str(len(attended)),
        names,
        type(first.module).__name__,
        str(first.channels),
        ', '.join(map(str, sorted(heads))),
        what,
    )


def _table(rows: Sequence[tuple]) -> str:
    head = ('stage', 'blocks', 'names', 'type', 'channels', 'head_dim', 'features')
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, tuple('-' * width for width in widths), *rows]
    return '\n'.join(
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(line, widths)) + ' |'
        for line in lines
    )
