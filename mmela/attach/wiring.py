"""Build layer attentions and attach them to the blocks of a network.

No other module builds them.
"""

from contextlib import ExitStack
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from ..arguments import arguments_of, check_arguments, check_count
from ..layers import AttentionState, LayerAttention
from ..layers.stage import PassHook, Place, Stage, attach_hooks, ensure_tap
from ..registry import LAYER_ATTENTIONS, find_layer_attention
from .blocks import Block, same_features
from .checkpoints import OlderCheckpoints
from .discovery import (
    Blocks,
    Trial,
    find_blocks,
    find_plain_blocks,
    group,
    name_blocks,
    name_matches,
    watch,
)
from .families import LAYERS_PER_STAGE, Stages, is_resnet, known_stages
from .inputs import (
    GIVEN_CHANNELS,
    Size,
    channels_to_try,
    other_arguments,
    random_images,
    sizes_to_try,
)

TOKEN_DEFAULTS = dict(
    norm_cfg=None,
    value_act_cfg=dict(type='GELU'),
    token_norm_cfg=dict(type='LN', eps=1e-6),
)
"""dict: Defaults of the attentions of transformer layers."""

NORMS_OF_MAPS = ('BN', 'BN2d', 'SyncBN', 'MMSyncBN', 'GN')
"""tuple[str]: Backbone norms that attentions on maps copy."""

WRAPPERS = (
    *('DataParallel', 'DistributedDataParallel', 'FullyShardedDataParallel'),
    *('AveragedModel', 'ModelEmaV2', 'ModelEmaV3'),
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHANNELS_LAST_TRIES = ((1.5, 1.5), (2, 2), (1.5, 2))


class _Seat(NamedTuple):
    """A built attention, its block, and the submodules that it replaces."""

    block: Block
    attention: LayerAttention
    replacements: Dict[str, nn.Module]


def attach_layer_attention(
    backbone: nn.Module,
    layer_attention: Optional[dict] = None,
    blocks: Blocks = 'auto',
    reset_pruning: bool = False,
    input_size: Optional[Size] = None,
    input_channels: Optional[int] = None,
    layers_per_stage: int = LAYERS_PER_STAGE,
) -> nn.Module:
    """Attach layer attentions to the blocks of any network, in place.

    Each attention becomes the submodule ``layer_attn`` of its block; all other
    keys of the network stay the same. The function logs a table of what it
    attached. It runs a network of an unknown family once, to see the features of
    its blocks. If it raises an error, the network is unchanged.

    Args:
        backbone (nn.Module): A network that takes images, (B, C, H, W).
        layer_attention (dict, optional): Config of the layer attention, such as
            ``dict(type='MRLABase')``. Arguments that it leaves out follow the
            blocks: ``channels``; ``head_dim``, the largest divisor of the channels
            up to 32; ``drop_path``, the rate of the block, but in ResNets the
            default of the attention; ``norm_cfg``, the norm of the backbone for
            maps (B, C, H, W). Transformers get a layer norm before the attention
            and a GELU. With ``zero_init`` or ``small_init``, stages that the
            backbone freezes get no attention, because it could not learn.
            Defaults to ``dict(type='MRLABase')``.
        blocks (str | Sequence): ``'auto'`` takes the residual blocks and puts
            consecutive blocks of one width and resolution into a stage; a
            transformer without stages gets stages of ``layers_per_stage``.
            A list of names or patterns such as ``'layers.*'`` takes these blocks
            and groups them the same way. A list of names for each stage sets the
            stages too; a name with a leading ``'!'`` stays in its stage without an
            attention. A list of indices for each stage of ``'auto'``, counted from
            0, picks the blocks that get one. Defaults to ``'auto'``.
        reset_pruning (bool): Start with every attention active even if the
            checkpoint of the backbone's ``init_cfg`` comes from a pruned network.
            A pruned attention then continues with the weights that it had when it
            was pruned. This does not affect ``load_from``, resuming or testing.
            Defaults to False.
        input_size (tuple[int, int], optional): Height and width of the input
            for that run. Defaults to None: the size that the network declares,
            or else common sizes, 224 first.
        input_channels (int, optional): Channels of the input, for that run and
            for everything that runs the network later, such as an export.
            Defaults to None: the channels of the network's first convolution.
        layers_per_stage (int): Layers per stage in a transformer without stages.
            Defaults to 4.

    Returns:
        nn.Module: The backbone.

    Raises:
        KeyError: If ``type`` is not a registered layer attention.
        TypeError: If ``layer_attention`` is not a dict with a ``type``, or if an
            argument in it is unknown or has the wrong type.
        ValueError: If the network is wrapped or already has layer attentions, if
            no block fits, if ``blocks`` is malformed or matches nothing, or if an
            argument does not fit a block.

    Example:
        >>> import torch, torchvision
        >>> import mmela
        >>> net = torchvision.models.mobilenet_v2()
        >>> net = mmela.attach_layer_attention(net, dict(type='MRLABase'))
        >>> net(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    arguments, attention_class = check_layer_attention(layer_attention)
    check_count('layers_per_stage', layers_per_stage, 1)
    if input_size is not None:
        input_size = _check_size(input_size)
    if input_channels is not None:
        check_count('input_channels', input_channels, 1)
    _check_network(backbone)
    stages, skipped = _find_stages(
        backbone, blocks, input_size, input_channels, layers_per_stage
    )
    frozen = _frozen_by_itself(backbone, stages)
    seats, rows, left_out = [], [], []
    before: Optional[Tuple[Stage, List[Block]]] = None
    for members in stages:
        stage = Stage([block.name for block in members], len(rows))
        # A user who names blocks wants attentions there, frozen or not.
        absent = blocks == 'auto' and _leaves_out(
            members, attention_class, arguments, frozen
        )
        stage_seats: List[_Seat] = []
        for index, block in enumerate(members):
            if absent or block.name in skipped:
                continue
            options = _arguments(backbone, block, attention_class, arguments)
            if index == 0 and before is not None:
                options.update(
                    _crossing(before, block, attention_class, options, stage)
                )
            is_frozen = block.name in frozen
            seat = _build(
                block, index, attention_class, options, stage, is_frozen, stage_seats
            )
            if seat is not None:
                stage_seats.append(seat)
            elif blocks != 'auto':
                raise ValueError(
                    f'blocks: the input of {block.name} does not have the shape of '
                    f'its output, {block.shape}, so {attention_class.__name__} finds '
                    "no identity there; leave the block out, or set previous='output'"
                )
        stage.set_size(len(stage_seats))
        seats += stage_seats
        if absent:
            left_out += [block.name for block in members]
        rows.append(_row(len(rows), members, stage_seats, absent))
        if not absent:
            before = stage, members
    if not seats and not left_out and not skipped:
        raise ValueError(f'blocks={blocks} gives no block a layer attention')
    containers = any(isinstance(seat.block.module, CONTAINERS) for seat in seats)
    images = (input_size, input_channels)
    before_attaching = _outputs(backbone, *images) if containers else None
    with ExitStack() as undo:
        _sit_down(seats, undo)
        hook = PassHook(list(dict.fromkeys(s.attention.place.stage for s in seats)))
        handle = backbone.register_forward_pre_hook(hook, with_kwargs=True)
        undo.callback(handle.remove)
        if before_attaching is not None:
            _check_unchanged(backbone, seats, before_attaching, images)
        undo.pop_all()
    if input_channels is not None:
        setattr(backbone, GIVEN_CHANNELS, input_channels)
    names = [[block.name for block in members] for members in stages]
    backbone._register_load_state_dict_pre_hook(OlderCheckpoints(names, left_out))
    if hasattr(backbone, 'init_weights'):
        backbone.init_weights = _InitWeights(backbone, reset_pruning)
    print_log(
        f'Layer attention of {type(backbone).__name__}:\n{_table(rows)}', 'current'
    )
    return backbone


@LAYER_ATTENTIONS.register_module(name='WithLayerAttention')
def with_layer_attention(backbone: Any, **kwargs) -> nn.Module:
    """Build a backbone of any toolbox with layer attention, for configs.

    Use ``type='mmela.WithLayerAttention'``. The result is the backbone itself,
    with its own keys, attributes and methods.

    Args:
        backbone (dict): Config of the backbone.
        **kwargs: Arguments of :func:`attach_layer_attention`. ``attention_blocks``
            is the name that versions before 0.2 had for ``blocks`` by index.
            ``init_cfg`` replaces the one of the backbone.

    Returns:
        nn.Module: The backbone.

    Raises:
        KeyError: If the backbone or the layer attention is not registered.
        TypeError: If ``backbone`` is not a dict with a ``type``.
        ValueError: As in :func:`attach_layer_attention`.
    """
    from mmengine.registry import MODELS

    if not isinstance(backbone, dict) or 'type' not in backbone:
        raise TypeError(
            'WithLayerAttention needs the config of a backbone, such as '
            f"backbone=dict(type='SwinTransformer'), got {backbone!r}"
        )
    if 'init_cfg' in kwargs:  # tools set it to None before they load weights
        backbone = {**backbone, 'init_cfg': kwargs.pop('init_cfg')}
    if kwargs.get('attention_blocks') is not None:
        kwargs['blocks'] = kwargs['attention_blocks']
    kwargs.pop('attention_blocks', None)
    check_arguments(attach_layer_attention, kwargs, name='WithLayerAttention')
    return attach_layer_attention(MODELS.build(backbone), **kwargs)


def check_layer_attention(layer_attention: Optional[dict]) -> Tuple[dict, type]:
    """Split the config of a layer attention into arguments and class.

    Args:
        layer_attention (dict, optional): The config; None for ``MRLABase``.

    Returns:
        tuple[dict, type]: The arguments and the class.

    Raises:
        KeyError: If ``type`` is not a registered layer attention.
        TypeError: If the config is not a dict with a ``type``, or if an argument is
            unknown or has the wrong type.
    """
    if layer_attention is None:
        layer_attention = dict(type='MRLABase')
    if not isinstance(layer_attention, dict) or 'type' not in layer_attention:
        raise TypeError(
            'layer_attention must be a dict with a type, such as '
            f"dict(type='MRLABase'), got {layer_attention!r}"
        )
    arguments = dict(layer_attention)
    attention_class = find_layer_attention(arguments.pop('type'))
    check_arguments(attention_class, arguments)
    return arguments, attention_class


def _check_network(backbone: nn.Module) -> None:
    name = type(backbone).__name__
    for module in backbone.modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if is_model_wrapper(module) or not kinds.isdisjoint(WRAPPERS):
            raise ValueError(
                f'{type(module).__name__} wraps a network; attach before wrapping: '
                'attach_layer_attention(model.module)'
            )
    if isinstance(backbone, torch.jit.ScriptModule) or hasattr(backbone, '_orig_mod'):
        raise ValueError(
            f'{name} is compiled; attach before torch.compile or torch.jit.script'
        )
    if any(isinstance(module, LayerAttention) for module in backbone.modules()):
        raise ValueError(f'{name} already has layer attentions')


# -- which blocks ----------------------------------------------------------------


def _find_stages(
    backbone: nn.Module,
    blocks: Blocks,
    input_size: Optional[Size],
    input_channels: Optional[int],
    layers_per_stage: int,
) -> Tuple[Stages, Set[str]]:
    """Find the stages, and the names of blocks in them that get no attention."""
    known = known_stages(backbone, layers_per_stage)
    first = channels_to_try(backbone)[0]
    if known and input_channels not in (None, first):
        raise ValueError(
            f'input_channels={input_channels}, but {type(backbone).__name__} takes '
            f'images of {first} channels'
        )
    by_index = _are_indices(blocks)
    if by_index or isinstance(blocks, str) and blocks == 'auto':
        stages = known or _discover(
            backbone, input_size, input_channels, layers_per_stage
        )
        return stages, _others(stages, blocks) if by_index else set()
    _check_form(blocks)
    flat = [name for entry in blocks for name in _names(entry)]
    skipped = {name[1:] for name in flat if name.startswith('!')}
    patterns = [name.lstrip('!') for name in flat]
    in_table = [block for members in known or () for block in members]
    for pattern in patterns:
        if not any(name_matches(pattern, block.name) for block in in_table):
            in_table = []  # only a forward pass can find this block
    if in_table:
        named = [b for b in in_table if any(name_matches(p, b.name) for p in patterns)]
    else:
        named = _settled(
            backbone,
            input_size,
            input_channels,
            lambda trial: name_blocks(trial, patterns),
        )
    if all(isinstance(entry, str) for entry in blocks):
        if in_table:
            chosen = {block.name for block in named}
            kept = [[b for b in m if b.name in chosen] for m in known or ()]
            return [members for members in kept if members], skipped
        return group(named), skipped
    stages = []
    for number, entry in enumerate(blocks):
        patterns = [name.lstrip('!') for name in entry]
        members = [
            block
            for block in named
            if any(name_matches(pattern, block.name) for pattern in patterns)
        ]
        for block in members[1:]:
            if not same_features(members[0], block):
                raise ValueError(
                    f'blocks[{number}]: {members[0].name} returns '
                    f'{members[0].shape} and {block.name} {block.shape}, but all '
                    'blocks of a stage must have the same width and resolution'
                )
        stages.append(members)
    return stages, skipped


def _are_indices(blocks: Any) -> bool:
    """Whether blocks are a list of indices for each stage."""
    return (
        isinstance(blocks, (list, tuple))
        and bool(blocks)
        and all(isinstance(entry, (list, tuple)) for entry in blocks)
        and all(type(index) is int for entry in blocks for index in entry)
    )


def _others(stages: Stages, blocks: Any) -> Set[str]:
    """Names of the blocks whose index the user did not list."""
    if len(blocks) != len(stages):
        raise ValueError(
            f'blocks={blocks} lists {len(blocks)} stages, but the backbone has '
            f'{len(stages)}'
        )
    others = set()
    for number, (indices, members) in enumerate(zip(blocks, stages)):
        allowed = set(range(len(members)))
        if list(indices) != sorted(set(indices)) or not set(indices) <= allowed:
            raise ValueError(
                f'blocks[{number}]={list(indices)} must list indices of blocks in '
                f'ascending order, each once; allowed are 0 to {len(members) - 1}'
            )
        others |= {members[index].name for index in allowed - set(indices)}
    return others


def _discover(
    backbone: nn.Module,
    input_size: Optional[Size],
    input_channels: Optional[int],
    layers_per_stage: int,
) -> Stages:
    trials: List[Trial] = []

    def find(trial: Trial) -> List[Block]:
        trials.append(trial)
        return find_blocks(trial) or find_plain_blocks(trial)

    stages = group(_settled(backbone, input_size, input_channels, find))
    if not stages:
        calls = trials[-1].calls
        ran = ', '.join(sorted({type(c.module).__name__ for c in calls if c.name}))
        raise ValueError(
            f'{type(backbone).__name__} has no blocks that attention can follow. They '
            'must be residual, or consecutive modules of one class, and return maps '
            '(B, C, H, W) or (B, H, W, C) or tokens (B, L, C). The forward pass made '
            f'{len(calls)} calls, of {ran}. Name the blocks yourself: '
            "blocks=['layer1.*', 'layer2.*'], or a list of names for each stage"
        )
    own_drop_path = is_resnet(backbone)
    for members in stages:
        for block in members:
            block.own_drop_path = own_drop_path
    one_size = len({members[0].size for members in stages}) == 1
    if one_size and stages[0][0].features.layout != 'BCHW':
        step = layers_per_stage
        stages = [m[i : i + step] for m in stages for i in range(0, len(m), step)]
    return stages


def _settled(backbone, input_size, input_channels, find) -> List[Block]:
    """Find blocks by a trial; a second one settles layouts that are ambiguous."""
    trial = _try(backbone, input_size, input_channels)
    blocks = find(trial)
    tied = {block.name for block in blocks} & trial.tied
    if not tied:
        return blocks
    height, width = trial.size
    for down, across in CHANNELS_LAST_TRIES:
        other = (int(height * down), int(width * across))
        try:
            trial.settle(_try(backbone, other, input_channels))
        except ValueError:  # the network takes no other size
            continue
        blocks = find(trial)
        tied = {block.name for block in blocks} & trial.tied
        if not tied:
            return blocks
    name = sorted(tied)[0]
    shape = next(block.shape for block in blocks if block.name == name)
    raise ValueError(
        f'{name} returns {shape}, and its channels may be axis 1 or axis 3; set '
        'input_size=(height, width) so that the maps differ in size from the channels'
    )


def _try(
    backbone: nn.Module,
    input_size: Optional[Size],
    input_channels: Optional[int],
    outputs: Optional[List[torch.Tensor]] = None,
) -> Trial:
    """Watch a forward pass at the first size that the network takes.

    Adds the tensors that the network returns to ``outputs``.
    """
    sizes = [input_size] if input_size else sizes_to_try(backbone)
    channels = [input_channels] if input_channels else channels_to_try(backbone)
    batch = 2
    reason: Optional[Exception] = None
    for count in channels:
        for size in sizes:
            x = random_images(backbone, batch, count, size)
            try:
                calls = watch(backbone, x, *other_arguments(backbone), outputs=outputs)
            except Exception as error:  # a network may raise anything
                reason = reason or error
            else:
                return Trial(calls, batch, size)
    raise ValueError(
        f'{type(backbone).__name__} runs at none of the sizes {sizes} with '
        f'{" or ".join(map(str, channels))} channels: {reason}; set '
        'input_size=(height, width) and input_channels'
    ) from reason


def _check_size(size: Any) -> Size:
    fits = isinstance(size, (tuple, list)) and len(size) == 2
    if not fits or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f'input_size={size!r} is not a pair (height, width)')
    return size[0], size[1]


def _names(entry: Any) -> List[str]:
    return [entry] if isinstance(entry, str) else list(entry)


def _check_form(blocks: Any) -> None:
    form = (
        "'auto', a list of names or patterns, or a list of names or of indices for "
        'each stage'
    )
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
    names = [name for entry in blocks for name in _names(entry)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'blocks={blocks!r} lists {twice[0]!r} more than once')


# -- frozen stages -----------------------------------------------------------------


def _frozen_by_itself(backbone: nn.Module, stages: Stages) -> Set[str]:
    """Names of the blocks that a toolbox's backbone freezes by ``frozen_stages``.

    Blocks that a user froze with ``requires_grad_(False)`` do not count: their
    attentions are new and can be trained alone.
    """
    freeze = getattr(backbone, '_freeze_stages', None)
    count = getattr(backbone, 'frozen_stages', -1)
    if freeze is None or not isinstance(count, int) or count < 0:
        return set()
    flags = [(param, param.requires_grad) for param in backbone.parameters()]
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        for param, _ in flags:
            if param.is_floating_point():
                param.requires_grad_(True)
        freeze()
        return {
            block.name
            for members in stages
            for block in members
            if not any(p.requires_grad for p in block.module.parameters())
        }
    finally:
        for param, flag in flags:
            param.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _leaves_out(
    members: Sequence[Block], attention_class: type, arguments: dict, frozen: Set[str]
) -> bool:
    """Whether a stage gets no attention because it could not learn there."""
    return (
        bool(members)
        and all(block.name in frozen for block in members)
        and _starts_from_plain(arguments)
        and not _crosses(attention_class, arguments)
    )


def _starts_from_plain(arguments: dict) -> bool:
    return bool(arguments.get('zero_init')) or arguments.get('small_init') is not None


# -- building ------------------------------------------------------------------------


def _arguments(
    backbone: nn.Module, block: Block, attention_class: type, given: dict
) -> Dict[str, Any]:
    """Arguments of a block's attention: its config over defaults from the block."""
    allowed = arguments_of(attention_class)
    defaults: Dict[str, Any] = {}
    if 'head_dim' in allowed:
        defaults['head_dim'] = max(d for d in range(1, 33) if block.channels % d == 0)
    # An attention that replaces the output has no branch to drop
    if not block.own_drop_path and attention_class.is_branch(given):
        defaults['drop_path'] = _drop_path(block.module)
    if block.features.layout != 'BCHW':
        defaults.update({k: v for k, v in TOKEN_DEFAULTS.items() if k in allowed})
    elif 'norm_cfg' in allowed:
        norm_cfg = getattr(backbone, 'norm_cfg', None)
        known = isinstance(norm_cfg, dict) and norm_cfg.get('type') in NORMS_OF_MAPS
        # Detectors with a frozen BN set requires_grad=False in norm_cfg. The norm
        # of the attention is not pre-trained, so it has to learn.
        defaults['norm_cfg'] = (
            {k: v for k, v in norm_cfg.items() if k != 'requires_grad'}
            if known
            else dict(type='BN')
        )
    return {**defaults, **given}


def _drop_path(block: nn.Module) -> float:
    """Stochastic depth rate of a block; 0 if it has none."""
    for module in block.modules():
        if type(module).__name__ in ('DropPath', 'StochasticDepth'):
            value = getattr(module, 'drop_prob', getattr(module, 'p', None))
            return float(value or 0.0)
    return 0.0


def _crosses(attention_class: type, arguments: dict) -> bool:
    """Whether attentions start from the memory of the previous stage."""
    return bool(attention_class.crosses_stages and arguments.get('cross_stage', True))


def _crossing(
    before: Tuple[Stage, List[Block]],
    block: Block,
    attention_class: type,
    arguments: dict,
    stage: Stage,
) -> dict:
    """Let a stage start from the memory of the previous one, where it can."""
    earlier, members = before
    if not members or not _crosses(attention_class, arguments):
        return {}
    if not block.follows or block.stride < 1:
        return {}
    allowed = arguments_of(attention_class)
    crossing = dict(previous_channels=members[-1].channels, stride=block.stride)
    if 'previous_channels' in allowed and 'cross_stage' not in arguments:
        heads = block.channels // arguments['head_dim'] or 1
        if members[-1].channels % heads:
            print_log(
                f'{attention_class.__name__}: the stage of {block.name} starts without '
                'the memory of the previous stage, because that has '
                f'{members[-1].channels} channels, which {heads} heads do not divide',
                'current',
            )
            return {}
    if earlier.size:
        stage.before = earlier
        earlier.hands_over = True
    return {k: v for k, v in crossing.items() if k in allowed}


def _build(
    block: Block,
    index: int,
    attention_class: type,
    arguments: Dict[str, Any],
    stage: Stage,
    frozen: bool,
    earlier: Sequence[_Seat],
) -> Optional[_Seat]:
    """Build the attention of a block; None if the block lacks what it needs."""
    allowed = arguments_of(attention_class)
    if 'block' in allowed:
        arguments['block'] = index
    if earlier and attention_class.shared:
        arguments['owns_shared'] = False
    if frozen and arguments.get('small_init') is not None:
        # It only feeds the memory of the next stage.
        arguments.update(small_init=None, zero_init=True)
    attention = attention_class(block.channels, **arguments)
    from_plain = _starts_from_plain(arguments) and attention.scale is None
    if from_plain and 'norm_cfg' in allowed and block.features.layout != 'BCHW':
        raise ValueError(
            f'{block.name} returns tokens, where zero_init and small_init need '
            'token_norm_cfg or norm_cfg=None'
        )
    lacks = not block.same_input and block.shortcut is None
    if attention.needs_identity and lacks:
        return None
    attention.place = Place(
        stage,
        block.name,
        len(earlier),
        block.features,
        block.inputs,
        None if block.same_input else block.shortcut,
        block.changes_input,
    )
    attention.taps, replacements = attention.connect(block.module)
    like = next(iter(block.module.parameters()), None)
    if like is not None:
        attention.to(like.device, like.dtype if like.is_floating_point() else None)
    attention.train(block.module.training)
    if frozen and not any(p.requires_grad for p in block.module.parameters()):
        attention.requires_grad_(False)
    return _Seat(block, attention, replacements)


def _sit_down(seats: Sequence[_Seat], undo: ExitStack) -> None:
    """Attach all attentions; ``undo`` removes them again."""
    watched = set()
    for block, attention, replacements in seats:
        module = block.module
        if hasattr(module, 'layer_attn'):
            raise ValueError(f'{block.name} already has an attribute layer_attn')
        for name, other in replacements.items():
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, other)
        undo.callback(module._modules.pop, 'layer_attn', None)
        module.layer_attn = attention
        for handle in attach_hooks(module):
            undo.callback(handle.remove)
        for name, method in attention.taps.items():
            undo.callback(ensure_tap(module, name, attention, method).remove)
        source, resolution = block.tells_size, block.features.resolution
        needed = attention.needs_map and source is not None
        if needed and resolution not in watched:
            watched.add(resolution)
            undo.callback(resolution.watch(source).remove)
        for handle in _expect(module, attention):
            undo.callback(handle.remove)


def _outputs(backbone: nn.Module, size: Optional[Size], channels: Optional[int]):
    """Run a trial and return the outputs of the network."""
    outputs: List[torch.Tensor] = []
    _try(backbone, size, channels, outputs)
    return outputs


def _check_unchanged(
    backbone: nn.Module, seats: Sequence[_Seat], before: list, images: tuple
) -> None:
    """Check that a further child changes nothing in blocks that are containers.

    A network may loop over the children of a container or index them.

    Raises:
        ValueError: If the output differs although all attentions are pruned.
    """
    for seat in seats:
        seat.attention._state = AttentionState.PRUNED
    try:
        after = _outputs(backbone, *images)
    except ValueError:
        after = []
    finally:
        for seat in seats:
            seat.attention._state = AttentionState.ACTIVE
            seat.attention.place.stage.set_size(seat.attention.place.stage.size)
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        kinds = {type(s.block.module).__name__: s.block.name for s in seats}
        raise ValueError(
            'the network computes something else once layer_attn is added to these '
            f'blocks, because it uses their children by position: {kinds}. Choose '
            'other blocks with blocks=[...]'
        )


def _expect(module: nn.Module, attention: LayerAttention) -> list:
    """Raise in the first backward pass if a block's attention never ran.

    Some networks call another method of a block than ``forward``; no hook runs then.
    """
    param = next((p for p in module.parameters() if p.requires_grad), None)
    inner = {id(p) for p in attention.parameters()}
    if param is None or id(param) in inner:
        return []

    @torch.utils.hooks.unserializable_hook
    def check(grad: torch.Tensor) -> None:
        handle.remove()
        if not attention.reached:
            raise RuntimeError(
                f'layer attention: block {attention.place.block} is being trained, but '
                'its attention never ran, because the network does not call the '
                "block's forward(). Leave the block out with blocks=[...]"
            )

    handle = param.register_hook(check)
    return [handle]


class _InitWeights:
    """``init_weights`` of a backbone, followed by that of its attentions.

    Many backbones initialize by module type and would overwrite the weights of
    attentions; others skip modules that they do not know.
    """

    def __init__(self, backbone: nn.Module, reset_pruning: bool) -> None:
        self.original = backbone.init_weights
        self.backbone = (backbone,)
        self.reset_pruning = reset_pruning

    def __call__(self, *args, **kwargs) -> Any:
        attentions = [
            module
            for module in self.backbone[0].modules()
            if isinstance(module, LayerAttention)
        ]
        result = self.original(*args, **kwargs)
        for attention in attentions:
            if not attention.loaded:
                attention.init_weights()
            if self.reset_pruning:
                attention.attention_state = AttentionState.ACTIVE
        return result


# -- the table ------------------------------------------------------------------------


def _row(
    number: int, members: Sequence[Block], seats: Sequence[_Seat], absent: bool
) -> tuple:
    if not members:
        return (str(number), *[''] * 6)
    first, attended = members[0], [seat.block.name for seat in seats]
    names = ', '.join(attended) if len(attended) < 3 else ''
    names = names or (f'{attended[0]} ... {attended[-1]}' if attended else 'none')
    if absent:
        names = f'none: {first.name} ... {members[-1].name} are frozen'
    features = first.features.layout
    if first.size is not None:
        features = f'{first.size[0]}x{first.size[1]}, {features}'
    if first.features.extra:
        features += f', {first.features.extra} more'
    heads = {seat.attention.head_dim for seat in seats}
    return (
        str(number),
        str(len(attended)),
        names,
        type(first.module).__name__,
        str(first.channels),
        ', '.join(map(str, sorted(heads))),
        features,
    )


def _table(rows: Sequence[tuple]) -> str:
    head = ('stage', 'blocks', 'names', 'type', 'channels', 'head_dim', 'features')
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, tuple('-' * width for width in widths), *rows]
    return '\n'.join(
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(line, widths)) + ' |'
        for line in lines
    )
