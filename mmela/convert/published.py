"""Checkpoints of the published MRLA and KCLA networks in mmela's layout.

MRLA: https://github.com/joyfang1106/MRLA (its ResNets and DeiT),
KCLA: https://github.com/bgx666/KCLA (its CIFAR folder has MRLA, DLA and DIA too).
"""

import math
import re
from collections import Counter
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

ARCHS = (
    'mrla_base',
    'mrla_base_no_relu',
    'mrla_light',
    'mla',
    'mla_eq4',
    'kcla',
    'kcla_first',
    'kcla_unet',
    'dla_light',
    'dla_base',
    'dia',
    'deit_mrla_base',
    'deit_mrla_light',
)
TARGETS = ('classifier', 'detector', 'backbone', 'segmentor')

_UNET_HEAD_DIM = 16
# What the keys alone do not say: networks of one layout
_SAME_KEYS = ('mrla_base', 'mrla_base_no_relu', 'mla')
_ATTENTIONS: Dict[str, dict] = dict(
    mrla_base=dict(type='MRLABase'),
    mrla_base_no_relu=dict(type='MRLABase', relu=False),
    mrla_light=dict(type='MRLALight'),
    mla=dict(type='MLA'),
    mla_eq4=dict(type='MLA', replace=True),
    kcla=dict(type='KCLA'),
    # Temperatures the other way round, and the direction of all keys so far
    kcla_first=dict(type='KCLA', temperature=1 / 0.7, direction='sum'),
    kcla_unet=dict(
        type='KCLA',
        head_dim=_UNET_HEAD_DIM,
        temperature=1 / 0.7,
        head_attention='plain',
        relu=False,
        eps=0.0,
    ),
    dla_light=dict(type='DLALight'),
    dla_base=dict(type='DLABase'),
    dia=dict(type='DIA'),
    # Algorithm 2 has no GELU
    deit_mrla_base=dict(type='MRLABase', head_dim=16, value_act_cfg=None),
    deit_mrla_light=dict(type='MRLALight', head_dim=16),
)
_DEIT = ('deit_mrla_base', 'deit_mrla_light')
_DEIT_NAMES = {192: 'deit-tiny', 384: 'deit-small', 768: 'deit-base'}
_DEIT_LAYERS_PER_STAGE = 4
# What the published code sets. No tensor of MRLA's depends on it, and it is
# not always what the paper says: that has 32 for every ResNet.
_HEAD_DIM = dict(mrla_base=16, mrla_base_no_relu=16, mrla_light=32, mla_eq4=32)
_CIFAR_HEAD_DIM = 16
_DEPTHS: Dict[Tuple[int, ...], int] = {
    (3, 4, 6, 3): 50,
    (3, 4, 23, 3): 101,
    (3, 8, 36, 3): 152,
}

# layer2.0.<leaf>, stages.1.0.<leaf>, and for KCLA on ImageNet and COCO, and for DLA,
# layer2.layers.0.<leaf of the block>, layer2.attention.0.<leaf of the attention>;
# for DIA layer2.ModuleList.0.<leaf>; of a stage layer2.<leaf>
_STAGE = r'(?:layer(?P<layer>\d{1,2})|stages\.(?P<stage>\d{1,2}))\.'
_BLOCK_KEY = re.compile(
    _STAGE + r'(?:(?P<part>layers|attention|ModuleList)\.)?'
    r'(?P<block>\d{1,3})\.(?P<leaf>.+)'
)
_STAGE_KEY = re.compile(_STAGE + r'(?P<leaf>(?:lstm|excite)\..+)')
# What the first attention of a stage holds for all
_SHARED = ('layer_attn.dsu.', 'layer_attn.refresh.', 'layer_attn.cell.')
_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_OPTIONAL = 'num_batches_tracked'  # not in checkpoints of torch < 0.4.1
_SCALES = 'layer_attn.scales'
_CROSS_STAGE = 'layer_attn.cross_stage.'
_RESTART_KEY = r'layer(\d+)\.(\d+)\.layer_attn\.cross_stage\.key\.weight'
_DETECTOR_PARTS = ('neck.', 'rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.')


class KeyMap(NamedTuple):
    """Where the keys of a published checkpoint go.

    Attributes:
        mapped (dict[str, str]): New key by published key.
        dropped (dict[str, str]): Reason by published key that is left out.
        arch (str): The architecture, one of :data:`ARCHS`.
    """

    mapped: Dict[str, str]
    dropped: Dict[str, str]
    arch: str


def convert_published(
    state_dict: Dict[str, Tensor],
    arch: Optional[str] = None,
    target: str = 'classifier',
) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Convert the state dict of a published network to mmela's layout.

    Args:
        state_dict (dict[str, Tensor]): State dict of a published network, of
            a detector of MMDetection with a published backbone, or either
            with the prefix ``module.`` of a data-parallel wrapper.
        arch (str, optional): One of :data:`ARCHS`. Defaults to None, which
            means to tell from the keys, see :func:`detect_arch`.
        target (str): What the result is for. Defaults to ``'classifier'``.

            - ``'classifier'``: MMPretrain's ``ImageClassifier``, whose keys
              start with ``backbone.`` and ``head.fc.``.
            - ``'detector'``: a detector of MMDetection. Its neck and heads
              stay as they are. From a published classifier this makes what
              ``init_cfg=dict(type='Pretrained', prefix='backbone.', ...)`` of
              a detector's backbone loads, without the classifier.
            - ``'backbone'``: a backbone of MMPretrain alone, without prefix.
            - ``'segmentor'``: the U-Net, which is for nothing else.

    Returns:
        tuple[dict[str, Tensor], dict[str, str]]: The converted state dict, in
        which all layer attentions are active, and by published key the reason
        for which it was left out.

    DLA and DIA are converted as their papers have them. The published code takes,
    for all images of a batch, the state of the first one where DLA brings earlier
    layers up to date: outputs are the same for an image alone. The decoder of the
    U-Net is ``UNetHead`` with ``scale=2``.

    Raises:
        ValueError: If ``arch`` or ``target`` is unknown, a value is no tensor,
            a key has no place in mmela's network, two keys have the same, a
            part of the network is missing, or a fixed tensor has other values
            than the published ones.
    """
    state_dict = strip_module(state_dict)
    for key, value in state_dict.items():
        if not torch.is_tensor(value):
            raise ValueError(f'{key} is no tensor but {type(value).__name__}')
    keys = map_published_keys(state_dict, arch, target)
    root = _root_of_head_dim(state_dict) if keys.arch == 'kcla_first' else 1.0
    for key in keys.dropped:
        if key.endswith('.norm_d'):
            _check_scales(key, state_dict[key], keys.arch, root)
    # Blocks by what each has one of
    sign = '.conv1.weight' if keys.arch == 'dia' else '.layer_attn.query.weight'
    converted = {}
    for old, new in keys.mapped.items():
        value = state_dict[old]
        if new.endswith('.lambda_o'):
            value = value.flatten()  # published as (C, 1, 1)
        elif keys.arch == 'kcla_first' and new.endswith('.key.weight'):
            value = value / root  # the published scores have it
        elif keys.arch == 'kcla_unet':
            value = _unet_value(state_dict, old, value)
        converted[new] = value
        if new.endswith(sign) and 'layer' in new:
            where = new.split('.layer_attn.')[0].replace('.conv1.weight', '')
            converted[f'{where}.layer_attn.state'] = torch.tensor(0, dtype=torch.uint8)
    if keys.arch == 'kcla_unet':
        for new in list(converted):
            # One key convolution there is for both
            if new.endswith('.cross_stage.norm.weight'):
                where = new[: -len('cross_stage.norm.weight')]
                key = converted[f'{where}key.weight']
                converted[f'{where}cross_stage.key.weight'] = key.clone()
    return converted, keys.dropped


def strip_module(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Take off the prefix ``module.`` if all keys have it.

    Args:
        state_dict (dict[str, Tensor]): A state dict.

    Returns:
        dict[str, Tensor]: The same tensors by shorter keys.
    """
    part = part_of(state_dict, 'module.')
    return part if len(part) == len(state_dict) else state_dict


def part_of(state_dict: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    """State dict of a part of a network.

    Args:
        state_dict (dict[str, Tensor]): That of the network.
        prefix (str): What the keys of the part begin with, such as
            ``'backbone.'``.

    Returns:
        dict[str, Tensor]: The tensors of the part by keys without the prefix.
    """
    return {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def detect_arch(keys: Iterable[str]) -> str:
    """Tell the architecture of a published network from its keys.

    MRLA-base with and without a ReLU, and the CIFAR network with the attention
    of MRLA eq. 3, have the same keys: say which it is.

    Args:
        keys (Iterable[str]): Keys of its state dict.

    Returns:
        str: One of :data:`ARCHS`.

    Raises:
        ValueError: If the keys are of none of them, or of several.
    """
    parts = {part for key in keys for part in key.split('.')}
    for arch, signs in (
        ('kcla_unet', {'bn_attention', 'outc'}),
        ('kcla_first', {'bn_attention', 'select_temp'}),
        ('kcla', {'bn_attention'}),
        ('dla_light', {'bn_layer_attention', 'lambda_t'}),
        ('dla_base', {'bn_layer_attention'}),
        ('dia', {'lstm', 'ModuleList'}),
        ('deit_mrla_light', {'normx', 'lambda_t'}),
        ('deit_mrla_base', {'normx'}),
        ('mrla_light', {'lambda_t'}),
        ('mla_eq4', {'bn_la'}),
    ):
        if signs <= parts:
            return arch
    if 'bn_mrla' in parts:
        raise ValueError(
            f'networks of {", ".join(_SAME_KEYS)} have the same keys; say by arch '
            'which of them this is. mrla_base is what the authors train on ImageNet '
            "with a deep stem, mrla_base_no_relu their variant with ResNet's stem, "
            'and on CIFAR mrla_base is that of KCLA and mla its layer attention'
        )
    raise ValueError(
        'the keys are of no published network with layer '
        f'attention; known are {", ".join(ARCHS)}'
    )


def map_published_keys(
    state_dict: Dict[str, Tensor],
    arch: Optional[str] = None,
    target: str = 'classifier',
) -> KeyMap:
    """Say where each key of a published network goes.

    Args:
        state_dict (dict[str, Tensor]): State dict without ``module.``; only
            its keys matter.
        arch (str, optional): As in :func:`convert_published`. Defaults to
            None.
        target (str): As in :func:`convert_published`. Defaults to
            ``'classifier'``.

    Returns:
        KeyMap: New keys, and keys that are left out.

    Raises:
        ValueError: As :func:`convert_published`, but for the tensors' values.
    """
    if target not in TARGETS:
        raise ValueError(
            f'target={target!r} is unknown; allowed are {", ".join(TARGETS)}'
        )
    if arch is None:
        arch = detect_arch(state_dict)
    elif arch not in ARCHS:
        raise ValueError(f'arch={arch!r} is unknown; allowed are {", ".join(ARCHS)}')
    if arch in _DEIT:
        return _map_deit(state_dict, arch, target)
    if (arch == 'kcla_unet') != (target == 'segmentor'):
        raise ValueError(
            f"arch={arch!r} and target={target!r} do not fit: target='segmentor' is "
            "for arch='kcla_unet', and that for nothing else"
        )
    if arch == 'kcla_unet':
        return _map_unet(state_dict)
    detector = any(key.startswith('backbone.') for key in state_dict)
    if detector and target == 'classifier':
        raise ValueError(
            'the checkpoint is of a detector and has no '
            "classifier; allowed are target='detector' and "
            "target='backbone'"
        )
    stem = _stem_leaves(any('conv1.0.' in key for key in state_dict), target)
    leaves = _block_leaves(arch)

    mapped, dropped, unknown = {}, {}, []
    for key in state_dict:
        new, reason = _place(key, detector, target, stem, leaves)
        if new:
            mapped[key] = new
        elif reason:
            dropped[key] = reason
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f'arch={arch!r} has no place for {len(unknown)} keys: {", ".join(unknown)}'
        )
    twice = [key for key, count in Counter(mapped.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f'arch={arch!r}: more than one key becomes each of {", ".join(twice)}'
        )
    missing = _missing_keys(set(mapped.values()), stem, leaves, target)
    if missing:
        raise ValueError(
            f'{len(missing)} keys are missing that '
            f'arch={arch!r}, target={target!r} needs: '
            f'{", ".join(missing)}'
        )
    return KeyMap(mapped, dropped, arch)


def published_backbone(converted: Dict[str, Tensor], arch: str) -> dict:
    """Config of the backbone that a converted checkpoint is for.

    ``head_dim`` of MRLA cannot be read off the tensors. It is what the
    published code sets: on ImageNet and COCO 32 for MRLA-light and 16, not
    the paper's 32, for MRLA-base; on CIFAR 16. For KCLA it follows from the
    number of heads.

    Args:
        converted (dict[str, Tensor]): What :func:`convert_published` returns.
        arch (str): One of :data:`ARCHS`.

    Returns:
        dict: Config of an ``ELAResNet``, an ``ELABottleneckResNet_CIFAR``, an
        ``ELAVisionTransformer`` or an ``ELAUNetResNet``. The ``depth`` of a ResNet
        is None where no standard network has as many blocks.

    Raises:
        ValueError: If a tensor that tells the sizes has another shape, or
            KCLA restarts in some stages at blocks where it does not in others.
    """
    if arch in _DEIT:
        return _deit_backbone(converted, arch)
    if arch == 'kcla_unet':
        return _unet_backbone(converted)
    prefix = 'backbone.' if 'backbone.layer1.0.conv1.weight' in converted else ''
    tensors = part_of(converted, prefix)
    blocks = tuple(len(indices) for indices in _blocks(tensors))
    deep = 'conv1.weight' not in tensors
    cifar = not deep and _shape(tensors, 'conv1.weight', 4)[-1] == 3
    width, stem_width = _shape(tensors, 'layer1.0.conv1.weight', 4)[:2]
    if cifar:
        depth = 9 * blocks[0] + 2 if blocks == blocks[:1] * 3 else None
        head_dim = _CIFAR_HEAD_DIM
    else:
        depth = _DEPTHS.get(blocks)
        head_dim = _HEAD_DIM.get(arch)
    if arch in ('kcla', 'kcla_first'):
        heads = _shape(tensors, 'layer1.0.layer_attn.head_attention.weight', 2)[0]
        channels = _shape(tensors, 'layer1.0.layer_attn.norm.weight', 1)[0]
        head_dim = channels // heads
    name = 'ELABottleneckResNet_CIFAR' if cifar else 'ELAResNet'
    cfg: dict = dict(type=name, depth=depth)
    default = 16 if cifar else 64
    if stem_width != default:
        cfg['stem_channels'] = stem_width
    if width != default:
        cfg['base_channels'] = width
    if deep:
        cfg['deep_stem'] = True
    cfg['layer_attention'] = dict(_ATTENTIONS[arch])
    if arch != 'dia':
        cfg['layer_attention']['head_dim'] = head_dim
    if arch in ('dla_light', 'dla_base', 'dia'):
        cell = 'cell' if arch == 'dia' else 'dsu'
        name = f'layer1.0.layer_attn.{cell}.input.0.weight'
        bottleneck, channels = _shape(tensors, name, 2)
        cfg['layer_attention']['reduction'] = channels // bottleneck
    restarts = {
        (int(match[1]), int(match[2]))
        for match in map(re.compile(_RESTART_KEY).fullmatch, tensors)
        if match and int(match[2]) > 0
    }
    if restarts:
        indices = sorted({block for _, block in restarts})
        for stage, depth in enumerate(blocks, 1):
            for block in indices:
                if block < depth and (stage, block) not in restarts:
                    raise ValueError(
                        f'block {block} restarts in some stages but not in stage '
                        f'{stage}; mmela has no such KCLA'
                    )
        cfg['layer_attention']['restart_blocks'] = tuple(indices)
    return cfg


def _deit_leaves(arch: str) -> Tuple[Dict[str, str], Dict[str, str]]:
    """New by published key within a block, and of its attention."""
    block = {
        f'{old}.{name}': f'{new}.{name}'
        for old, new in (
            ('norm1', 'ln1'),
            ('attn.qkv', 'attn.qkv'),
            ('attn.proj', 'attn.proj'),
            ('norm2', 'ln2'),
            ('mlp.fc1', 'ffn.layers.0.0'),
            ('mlp.fc2', 'ffn.layers.1'),
        )
        for name in ('weight', 'bias')
    }
    attention = {
        f'mrla.mrla.{old}.weight': f'{new}.weight'
        for old, new in (('Wq', 'query'), ('Wk', 'key'), ('Wv', 'value'))
    }
    norms = {'mrla.normx': 'pre_norm'}
    if arch == 'deit_mrla_light':
        norms['mrla.normo'] = 'identity_norm'
        attention['mrla.lambda_t'] = 'lambda_o'
    for old, new in norms.items():
        for name in ('weight', 'bias'):
            attention[f'{old}.{name}'] = f'{new}.{name}'
    return block, attention


def _map_deit(state_dict: Dict[str, Tensor], arch: str, target: str) -> KeyMap:
    """Say where each key of a published DeiT goes."""
    if target == 'detector':
        raise ValueError(
            f"target='detector' is for ResNets; allowed for arch={arch!r} are "
            "target='classifier' and target='backbone'"
        )
    prefix = '' if target == 'backbone' else 'backbone.'
    names = {'cls_token': 'cls_token', 'pos_embed': 'pos_embed'}
    for name in ('weight', 'bias'):
        names[f'patch_embed.proj.{name}'] = f'patch_embed.projection.{name}'
        names[f'norm.{name}'] = f'ln1.{name}'
    numbers = [re.match(r'blocks\.(\d{1,3})\.', key) for key in state_dict]
    depth = 1 + max([int(match[1]) for match in numbers if match], default=0)
    block, attention = _deit_leaves(arch)
    for i in range(depth):
        stage, index = divmod(i, _DEIT_LAYERS_PER_STAGE)
        where = f'layer_attn_stages.{stage}.{index}.layer_attn.'
        for old, new in block.items():
            names[f'blocks.{i}.{old}'] = f'layers.{i}.{new}'
        for old, new in attention.items():
            names[f'blocks.{i}.{old}'] = where + new
    mapped = {old: prefix + new for old, new in names.items()}
    dropped = {}
    for name in ('weight', 'bias'):
        if target == 'classifier':
            mapped[f'head.{name}'] = f'head.layers.head.{name}'
        elif f'head.{name}' in state_dict:
            dropped[f'head.{name}'] = 'classifier, which the target has not'
    unknown = [key for key in state_dict if key not in mapped and key not in dropped]
    if unknown:
        raise ValueError(
            f'arch={arch!r} has no place for {len(unknown)} keys: {", ".join(unknown)}'
        )
    missing = [key for key in mapped if key not in state_dict]
    if missing:
        raise ValueError(
            f'{len(missing)} keys are missing that '
            f'arch={arch!r}, target={target!r} needs: {", ".join(missing)}'
        )
    return KeyMap(
        {old: mapped[old] for old in state_dict if old in mapped}, dropped, arch
    )


def _deit_backbone(converted: Dict[str, Tensor], arch: str) -> dict:
    """Config of the vision transformer that a converted checkpoint is for."""
    prefix = 'backbone.' if 'backbone.pos_embed' in converted else ''
    tensors = part_of(converted, prefix)
    _, tokens, dims = _shape(tensors, 'pos_embed', 3)
    patch = _shape(tensors, 'patch_embed.projection.weight', 4)[-1]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(
            f'pos_embed has {tokens} tokens, which are no class token and a square'
        )
    depth = len({key.split('.')[1] for key in tensors if key.startswith('layers.')})
    cfg: dict = dict(type='ELAVisionTransformer', arch=_DEIT_NAMES.get(dims))
    if cfg['arch'] is None or depth != 12:
        cfg['arch'] = dict(
            embed_dims=dims,
            num_layers=depth,
            # 64 channels a head, as in all that are published
            num_heads=max(1, dims // 64),
            feedforward_channels=_shape(tensors, 'layers.0.ffn.layers.1.weight', 2)[1],
        )
    cfg.update(img_size=side * patch, patch_size=patch)
    cfg['layer_attention'] = dict(_ATTENTIONS[arch])
    return cfg


def _shape(tensors: Dict[str, Tensor], key: str, dims: int) -> Sequence[int]:
    """Shape of a tensor that must have so many dimensions, none of them empty."""
    shape = tuple(tensors[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f'{key} has shape {shape} instead of {dims} dimensions')
    return shape


def _leaves(convs: Dict[str, str], norms: Dict[str, str]) -> Dict[str, str]:
    """New by published key of what convolutions and normalizations hold."""
    leaves = {f'{old}.weight': f'{new}.weight' for old, new in convs.items()}
    for old, new in norms.items():
        leaves.update({f'{old}.{name}': f'{new}.{name}' for name in _NORM})
    return leaves


def _stem_leaves(deep: bool, target: str) -> Dict[str, str]:
    """New by published key of the stem."""
    if not deep:
        return _leaves({'conv1': 'conv1'}, {'bn1': 'bn1'})
    if target == 'detector':  # mmdet: conv, norm, ReLU three times
        convs, norms = ('stem.0', 'stem.3', 'stem.6'), ('stem.1', 'stem.4', 'stem.7')
    else:  # mmpretrain: three ConvModules
        convs = tuple(f'stem.{i}.conv' for i in range(3))
        norms = tuple(f'stem.{i}.bn' for i in range(3))
    return _leaves(
        dict(zip(('conv1.0', 'conv1.3', 'conv1.6'), convs)),
        dict(zip(('conv1.1', 'conv1.4', 'bn1'), norms)),
    )


def _block_leaves(arch: str) -> Dict[str, str]:
    """New by published key within a residual block and its attention."""
    convs = {name: name for name in ('conv1', 'conv2', 'conv3', 'downsample.0')}
    norms = {name: name for name in ('bn1', 'bn2', 'bn3', 'downsample.1')}
    others = {}
    if arch in ('kcla', 'kcla_first'):
        first = arch == 'kcla_first'
        layers = ['kcla']
        norms['kcla.bn_attention'] = 'layer_attn.norm'
        norms[f'kcla.{"membn" if first else "u_bn"}'] = f'{_CROSS_STAGE}norm'
        reduce = 'adjust_channel.0' if first else 'adjust_channel'
        convs[f'kcla.{reduce}'] = f'{_CROSS_STAGE}reduce'
        convs[f'kcla.{"memWk" if first else "u_Wk"}'] = f'{_CROSS_STAGE}key'
        head = 'select_temp' if first else 'head_att'
        convs[f'kcla.{head}'] = 'layer_attn.head_attention'
        others['kcla.norm_d'] = _SCALES
    elif arch in ('dla_light', 'dla_base', 'dia'):
        layers = []
        cell = 'layer_attn.' + ('cell' if arch == 'dia' else 'dsu')
        for old, new in (('w_ih', 'input'), ('w_hh', 'hidden')):
            for i in (0, 2):
                for name in ('weight', 'bias'):
                    others[f'lstm.{old}.0.seq.{i}.{name}'] = f'{cell}.{new}.{i}.{name}'
        if arch != 'dia':
            layers.append('attention.layer_attention.layer_attention')
            norms['attention.bn_layer_attention'] = 'layer_attn.norm'
        if arch == 'dla_light':
            convs['excite'] = 'layer_attn.refresh'
            others['attention.layer_attention.lambda_t'] = 'layer_attn.lambda_o'
    elif arch == 'mla_eq4':
        layers = ['la']
        norms['bn_la'] = 'layer_attn.norm'
    else:
        layers = ['mrla.mrla']
        norms['bn_mrla'] = 'layer_attn.norm'
    if arch == 'mrla_light':
        layers.append('mrla.mla')  # an older one, in detectors too
        others['mrla.lambda_t'] = 'layer_attn.lambda_o'
    for layer in layers:
        for old, new in (('Wq', 'query'), ('Wk', 'key'), ('Wv', 'value')):
            convs[f'{layer}.{old}'] = f'layer_attn.{new}'
    return {**_leaves(convs, norms), **others}


def _place(
    key: str, detector: bool, target: str, stem: Dict[str, str], leaves: Dict[str, str]
) -> Tuple[Optional[str], Optional[str]]:
    """New key, or why the published one is dropped; neither if it is unknown."""
    if detector and key.startswith(_DETECTOR_PARTS):
        if target == 'detector':
            return key, None
        return None, 'part of the detector, not of its backbone'
    if not detector and key in ('fc.weight', 'fc.bias'):
        if target == 'classifier':
            return f'head.{key}', None
        return None, 'classifier, which the target has not'
    if detector and not key.startswith('backbone.'):
        return None, None
    name = key[len('backbone.') :] if detector else key
    new, reason = _place_in_backbone(name, stem, leaves)
    if new and target != 'backbone':
        new = f'backbone.{new}'
    return new, reason


def _place_in_backbone(
    name: str, stem: Dict[str, str], leaves: Dict[str, str]
) -> Tuple[Optional[str], Optional[str]]:
    if name in stem:
        return stem[name], None
    if name.startswith(('finalbn.', 'bn2.')):
        return None, 'the published forward pass never reads it'
    shared = _STAGE_KEY.fullmatch(name)
    match = shared or _BLOCK_KEY.fullmatch(name)
    if match is None:
        return None, None
    stage = int(match['layer'] or int(match['stage']) + 1)
    block = 0 if shared else int(match['block'])
    leaf = match['leaf']
    if not shared and match['part'] == 'attention':
        leaf = f'attention.{leaf}' if f'attention.{leaf}' in leaves else f'kcla.{leaf}'
    new = leaves.get(leaf)
    if new is None or new.startswith(_SHARED) and not shared:
        return None, None
    if new == _SCALES:
        return None, (
            'fixed scales of the heads, which KCLA computes; their values were checked'
        )
    if new.startswith(_CROSS_STAGE):
        if stage == 1 and block == 0:
            return None, (
                'the published forward pass never reads it: the first stage has no '
                'stage before it'
            )
        # Published for block 11 of stage 3 of a ResNet-101
        if block > 0 and new == f'{_CROSS_STAGE}reduce.weight':
            return None, (
                'the published forward pass never reads it: within a stage the '
                'channels stay'
            )
    return f'layer{stage}.{block}.{new}', None


def _blocks(keys: Iterable[str]) -> List[List[int]]:
    """Indices of the blocks of each stage in mmela's keys without prefix."""
    stages: Dict[int, set] = {}
    for key in keys:
        match = re.match(r'layer(\d+)\.(\d+)\.', key)
        if match:
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    count = max(stages, default=0)
    return [sorted(stages.get(stage, [])) for stage in range(1, count + 1)]


def _missing_keys(
    found: set, stem: Dict[str, str], leaves: Dict[str, str], target: str
) -> List[str]:
    """Keys of a complete network that are not among the new ones."""
    prefix = '' if target == 'backbone' else 'backbone.'
    names = {key[len(prefix) :] for key in found if key.startswith(prefix)}
    needed = set(stem.values())
    for stage, blocks in enumerate(_blocks(names) or [[]], 1):
        # At least one, so that a stage without any is reported
        for block in range(max(blocks, default=0) + 1):
            where = f'layer{stage}.{block}.'
            absent = [_SCALES]
            if not any(name.startswith(f'{where}downsample.') for name in names):
                absent.append('downsample.')
            restarts = block > 0 and any(
                name.startswith(where + _CROSS_STAGE) for name in names
            )
            if restarts:
                absent.append(f'{_CROSS_STAGE}reduce')
            elif stage == 1 or block > 0:
                absent.append(_CROSS_STAGE)
            if block > 0:
                absent += _SHARED
            needed |= {
                where + leaf
                for leaf in leaves.values()
                if not leaf.startswith(tuple(absent))
            }
    needed = {prefix + name for name in needed}
    if target == 'classifier':
        needed |= {'head.fc.weight', 'head.fc.bias'}
    return sorted(key for key in needed - found if not key.endswith(_OPTIONAL))


def _root_of_head_dim(state_dict: Dict[str, Tensor]) -> float:
    """Root of the channels of a head, which the first KCLA's scales have."""
    dims = set()
    for key, scales in state_dict.items():
        norm = state_dict.get(key[: -len('norm_d')] + 'bn_attention.weight')
        if key.endswith('.norm_d') and norm is not None:
            dims.add(norm.numel() / max(1, scales.numel()))
    if len(dims) != 1 or 0 in dims:
        raise ValueError(
            f'heads have {sorted(dims)} channels; mmela has only networks in which '
            'all have the same number'
        )
    return math.sqrt(dims.pop())


def _check_scales(key: str, value: Tensor, arch: str, root: float) -> None:
    """Check the fixed tensor of KCLA that mmela computes itself."""
    heads = value.numel()
    bound = -math.log(0.7)
    expected = torch.linspace(bound, -bound, heads).exp()
    if arch == 'kcla_first':
        expected = root / expected
    if not torch.allclose(value.flatten().float(), expected, atol=1e-3):
        low, high = (0.7 * root, root / 0.7) if root != 1 else (1 / 0.7, 0.7)
        raise ValueError(
            f'{key} has other values than the published ones, '
            f'{low:.4g} to {high:.4g}: {value.flatten()[:4].tolist()} ...; mmela has '
            'no attention with these'
        )


def _unet_leaves(first: bool) -> Dict[str, str]:
    """New by published key within a block of the U-Net's encoder.

    Args:
        first (bool): Whether it is the first block of a stage.
    """
    leaves = _leaves(
        {f'layers.{name}': name for name in ('conv1', 'conv2', 'downsample.0')},
        {f'layers.{name}': name for name in ('bn1', 'bn2', 'downsample.1')},
    )
    convs = dict(Wq='query', Wk='key', Wv='value')
    norms = dict(bn_attention='norm')
    if first:
        convs['adjust_channel.0'] = 'cross_stage.reduce'
        norms['adjust_channel.1'] = 'cross_stage.norm'
    for old, new in _leaves(convs, norms).items():
        leaves[f'attention.{old}'] = f'layer_attn.{new}'
    return leaves


def _map_unet(state_dict: Dict[str, Tensor]) -> KeyMap:
    """Say where each key of the published U-Net goes."""
    names = {
        f'encoder.{old}': f'backbone.{new}'
        for old, new in _leaves({'conv1': 'conv1'}, {'bn1': 'bn1'}).items()
    }
    optional = set()
    numbers = [
        re.match(r'encoder\.layer(\d{1,2})\.layers\.(\d{1,3})\.', key)
        for key in state_dict
    ]
    found = {(int(match[1]), int(match[2])) for match in numbers if match}
    stages = range(1, 1 + max([stage for stage, _ in found], default=1))
    for stage in stages:
        for block in range(1 + max([b for s, b in found if s == stage], default=0)):
            for old, new in _unet_leaves(block == 0).items():
                part, leaf = old.split('.', 1)
                key = f'encoder.layer{stage}.{part}.{block}.{leaf}'
                names[key] = f'backbone.layer{stage}.{block}.{new}'
                # Not where the shortcut is the identity
                if 'downsample' in old:
                    optional.add(key)
    for step in range(len(stages)):
        for i in (0, 1):
            old, new = f'up{step + 1}.conv.double_conv', f'decode_head.steps.{step}.{i}'
            pair = _leaves(
                {f'{old}.{3 * i}': f'{new}.conv'}, {f'{old}.{3 * i + 1}': f'{new}.bn'}
            )
            names.update(pair)
    for name in ('weight', 'bias'):
        names[f'outc.conv.{name}'] = f'decode_head.conv_seg.{name}'
    mapped, dropped, unknown = {}, {}, []
    for key in state_dict:
        if key.startswith('encoder.layer1.attention.0.adjust_channel.'):
            dropped[key] = (
                'the published forward pass never reads it: the first stage has no '
                'stage before it'
            )
        elif key in names:
            mapped[key] = names[key]
        elif key.endswith('.norm_d'):
            dropped[key] = (
                'fixed scales of the heads, which KCLA computes; their values were '
                'checked'
            )
        elif key.startswith('encoder.bn2.'):
            dropped[key] = 'the published forward pass never reads it'
        elif _norm_of_bias(key) in state_dict:
            dropped[key] = 'is in the mean of the normalization that follows'
        else:
            unknown.append(key)
    arch = 'kcla_unet'
    if unknown:
        raise ValueError(
            f'arch={arch!r} has no place for {len(unknown)} keys: {", ".join(unknown)}'
        )
    missing = [
        key
        for key in names
        if key not in state_dict
        and key not in optional
        and not key.endswith(_OPTIONAL)
        and not key.startswith('encoder.layer1.attention.0.adjust_channel.')
    ]
    if missing:
        raise ValueError(
            f'{len(missing)} keys are missing that arch={arch!r}, '
            f"target='segmentor' needs: {', '.join(names[key] for key in missing)}"
        )
    for key in mapped:
        if key.endswith('adjust_channel.0.weight'):
            stage = int(key.split('.')[1][len('layer') :])
            before = f'encoder.layer{stage - 1}.attention.0.bn_attention.weight'
            out, inner = _shape(state_dict, key, 4)[:2]
            width = state_dict[before].numel() if before in state_dict else 0
            if inner not in (width, width // max(1, out // _UNET_HEAD_DIM)):
                raise ValueError(
                    f'{key} takes {inner} channels a group; of the {width} there are '
                    'all or those of a head are taken'
                )
    return KeyMap(mapped, dropped, arch)


def _norm_of_bias(key: str) -> str:
    """The running mean of the normalization that follows a convolution."""
    match = re.fullmatch(r'(.+(?:double_conv|adjust_channel)\.)(\d)\.bias', key)
    return f'{match[1]}{int(match[2]) + 1}.running_mean' if match else ''


def _unet_value(state_dict: Dict[str, Tensor], old: str, value: Tensor) -> Tensor:
    """A tensor of the U-Net, whose convolutions before a norm have a bias there."""
    match = re.fullmatch(r'(.+(?:double_conv|adjust_channel)\.)(\d)\.running_mean', old)
    if match is None:
        return value
    name = f'{match[1]}{int(match[2]) - 1}.bias'
    if name not in state_dict:
        return value
    bias = state_dict[name]
    if bias.shape != value.shape:
        raise ValueError(
            f'{name} has shape {tuple(bias.shape)}, {old} {tuple(value.shape)}'
        )
    return value - bias


def _unet_backbone(converted: Dict[str, Tensor]) -> dict:
    """Config of the encoder of the U-Net that a converted checkpoint is for."""
    tensors = part_of(converted, 'backbone.')
    blocks = _blocks(tensors)
    widths = [
        _shape(tensors, f'layer{i}.0.conv1.weight', 4)[0]
        for i in range(1, len(blocks) + 1)
    ]
    attention = dict(_ATTENTIONS['kcla_unet'])
    carried = 'layer2.0.layer_attn.cross_stage.reduce.weight'
    if carried in tensors:
        # The first version has one convolution for all heads; in the newest, with
        # one for each, later blocks of a stage do not see the earlier ones.
        first = _shape(tensors, carried, 4)[1] == widths[0]
        attention['cross_stage_groups'] = not first
        attention['accumulate'] = first
    return dict(
        type='ELAUNetResNet',
        depth=18 if [len(b) for b in blocks] == [2, 2, 2, 2] else None,
        stem_channels=_shape(tensors, 'conv1.weight', 4)[0],
        stage_channels=tuple(widths),
        layer_attention=attention,
    )
