"""Convert checkpoints of published networks with layer attention to mmela's layout.

MRLA: https://github.com/joyfang1106/MRLA (its ResNets and DeiT),
KCLA: https://github.com/bgx666/KCLA (its CIFAR folder has other attentions too),
DLA: https://github.com/tunantu/Dynamic-Layer-Attention.

:mod:`mmela.convert.published_names` lists the names in the published code. The
converted checkpoint must match, key by key, the network that is built for it.
"""

import math
import re
from collections import Counter
from importlib import import_module
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from .published_names import (
    BLOCK,
    DEEP_STEM,
    DEIT,
    DEIT_BLOCK,
    DETECTOR_PARTS,
    MMDET_STEM,
    MMPRETRAIN_STEM,
    MRLA,
    NETWORKS,
    SIGNS,
    STEM,
    UNET_DECODER,
)

ARCHS = tuple(NETWORKS)
# Toolbox of the network for each target
TARGETS = dict(
    classifier='mmpretrain', detector='mmdet', backbone='mmpretrain', segmentor='mmseg'
)
_DEIT_NAMES = {192: 'deit-tiny', 384: 'deit-small', 768: 'deit-base'}
_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}

# layer2.0.<leaf> or stages.1.0.<leaf>; for DLA, and for KCLA on ImageNet and COCO,
# layer2.layers.0.<leaf of the block> and layer2.attention.0.<leaf of the attention>;
# for DIA layer2.ModuleList.0.<leaf>; for parts of a stage layer2.<leaf>
_STAGE = r'(?:layer(?P<layer>\d{1,2})|stages\.(?P<stage>\d{1,2}))\.'
_BLOCK_KEY = re.compile(
    _STAGE + r'(?:(?P<part>layers|attention|ModuleList)\.)?'
    r'(?P<block>\d{1,3})\.(?P<leaf>.+)'
)
_STAGE_KEY = re.compile(_STAGE + r'(?P<leaf>(?:lstm|excite|extict)\..+)')
_DEIT_KEY = re.compile(r'blocks\.(?P<block>\d{1,3})\.(?P<leaf>.+)')
_BIAS = re.compile(r'(.+(?:double_conv|adjust_channel)\.)(\d)\.bias')
# Keys that published networks lack; the last one is missing before torch 0.4.1
_OWN = ('.layer_attn.state', '.layer_attn.signature', '.num_batches_tracked')
# Published with the same numbers in another shape
_RESHAPED = ('.lambda_o', '.position', '.spread')
_UNREAD = 'the published forward pass never reads it'


def _deit_attention(block: int) -> str:
    """Name of the attention of a block in ``ELAVisionTransformer``."""
    return f'layers.{block}.layer_attn'


# -- Conversion ----------------------------------------------------------------------


class Converted(NamedTuple):
    """A converted checkpoint.

    Attributes:
        arch (str): The network, one of :data:`ARCHS`.
        state_dict (dict[str, Tensor]): Its state dict, in which all layer
            attentions are active.
        backbone (dict): Config of the backbone.
        mapped (dict[str, str]): Published keys, mapped to new keys.
        dropped (dict[str, str]): Published keys that are dropped, mapped to reasons.
    """

    arch: str
    state_dict: Dict[str, Tensor]
    backbone: dict
    mapped: Dict[str, str]
    dropped: Dict[str, str]


def convert_published(
    state_dict: Dict[str, Tensor],
    arch: Optional[str] = None,
    target: str = 'classifier',
    head_dim: Optional[int] = None,
) -> Converted:
    """Convert the state dict of a published network to mmela's layout.

    This function builds the target network from :attr:`Converted.backbone` and loads
    the result into it, as a check.

    Args:
        state_dict (dict[str, Tensor]): State dict of a published network, or of a
            detector of MMDetection with a published backbone. Keys may have the
            prefix ``module.`` of a data-parallel wrapper.
        arch (str, optional): One of :data:`ARCHS`. Defaults to None: detect it from
            the keys, see :func:`detect_arch`.
        target (str): The network to convert to. Defaults to ``'classifier'``.

            - ``'classifier'``: MMPretrain's ``ImageClassifier``, whose keys
              start with ``backbone.`` and ``head.fc.``.
            - ``'detector'``: a detector of MMDetection. Its neck and heads stay
              unchanged. A published classifier becomes a checkpoint, without the
              classifier, for a detector's
              ``init_cfg=dict(type='Pretrained', prefix='backbone.', ...)``.
            - ``'backbone'``: a backbone of MMPretrain alone, without prefix.
            - ``'segmentor'``: the U-Net, which has no other target.
        head_dim (int, optional): Channels of a head. The tensors of MRLA and DLA do
            not show it, so it is required if the published code uses several values.
            Defaults to None, which means the only published value.

    Returns:
        Converted: The result.

    DLA and DIA are converted as described in their papers. Where DLA updates earlier
    layers, the published code uses the state of the first image for the whole batch,
    so outputs agree only for single images. The decoder of the U-Net is ``UNetHead``
    with ``scale=2``.

    Raises:
        ImportError: If the toolbox of the target is not installed.
        ValueError: If an argument is unknown or missing; if a value is not a tensor
            of a network; if a key is unknown, or two keys map to the same one; if a
            part of the network is missing or has another shape; or if a fixed tensor
            differs from the published one.
    """
    state_dict = strip_module(state_dict)
    for key, value in state_dict.items():
        if not torch.is_tensor(value):
            raise ValueError(f'{key} is a {type(value).__name__}, not a tensor')
    if target not in TARGETS:
        raise ValueError(
            f'target={target!r} is unknown; allowed are {", ".join(TARGETS)}'
        )
    if arch is None:
        arch = detect_arch(state_dict)
    elif arch not in ARCHS:
        raise ValueError(f'arch={arch!r} is unknown; allowed are {", ".join(ARCHS)}')
    if (arch == 'kcla_unet') != (target == 'segmentor'):
        raise ValueError(
            f'arch={arch!r} and target={target!r} do not go together: '
            "arch='kcla_unet' needs target='segmentor', which no other arch has"
        )
    mapped, dropped = _place_all(state_dict, arch, target)
    if arch.startswith('kcla'):
        head_dim = _head_dim_of_kcla(state_dict, arch, head_dim)
    for key in mapped:
        counts = key.endswith('.num_batches_tracked')
        if state_dict[key].is_floating_point() == counts:
            expected = 'an integer' if counts else 'a floating-point'
            raise ValueError(
                f'{key} has dtype {state_dict[key].dtype}; it must be {expected} tensor'
            )
    prefix = '' if target == 'backbone' else 'backbone.'
    tensors = {new: state_dict[old] for old, new in mapped.items()}
    configure = _deit_backbone if arch.startswith('deit') else _resnet_backbone
    if arch == 'kcla_unet':
        configure = _unet_backbone
    backbone = configure(part_of(tensors, prefix), arch, head_dim)
    if target == 'detector' and 'width_per_group' in backbone:  # mmdet's name
        backbone['base_width'] = backbone.pop('width_per_group')
    network = _build(backbone, tensors, target)
    heads = {k: v for k, v in tensors.items() if k.startswith(DETECTOR_PARTS)}
    for key in heads:
        del tensors[key]
    if arch == 'kcla_first':
        for key in tensors:
            if key.endswith('.key.weight'):  # published scores are divided by the root
                tensors[key] = tensors[key] / math.sqrt(head_dim)
    elif arch == 'kcla_unet':
        _fold_unet(tensors, state_dict, mapped)
    converted = _load(network, tensors, mapped, arch, target)
    return Converted(arch, {**converted, **heads}, backbone, mapped, dropped)


def strip_module(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Remove the prefix ``module.`` if all keys have it.

    Args:
        state_dict (dict[str, Tensor]): A state dict.

    Returns:
        dict[str, Tensor]: The same tensors under shorter keys.
    """
    part = part_of(state_dict, 'module.')
    return part if len(part) == len(state_dict) else state_dict


def part_of(state_dict: Dict[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    """Extract the state dict of a part of a network.

    Args:
        state_dict (dict[str, Tensor]): State dict of the network.
        prefix (str): Prefix of the keys of the part, such as ``'backbone.'``.

    Returns:
        dict[str, Tensor]: The tensors of the part, under keys without the prefix.
    """
    return {
        key[len(prefix) :]: value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def detect_arch(keys: Iterable[str]) -> str:
    """Detect the architecture of a published network from its keys.

    MRLA-base with and without a ReLU, and several attentions of KCLA's CIFAR networks,
    have the same keys and cannot be detected.

    Args:
        keys (Iterable[str]): Keys of its state dict.

    Returns:
        str: One of :data:`ARCHS`.

    Raises:
        ValueError: If the keys match no architecture or several ones.
    """
    parts = {part for key in keys for part in key.split('.')}
    for arch, signs in SIGNS:
        if signs <= parts:
            return arch
    if 'bn_mrla' in parts:
        same = [arch for arch in ARCHS if NETWORKS[arch].names is MRLA]
        raise ValueError(
            f'networks of {", ".join(same)} have the same keys; set arch to one of '
            "them. On ImageNet, mrla_base is the authors' network with a deep stem and "
            "mrla_base_no_relu the one with ResNet's stem. On CIFAR, mrla_base is in "
            "the code of KCLA and DLA, the others only in KCLA's (mla is its "
            'layer_attention.py)'
        )
    raise ValueError(
        'the keys match no published network with layer attention; known are '
        f'{", ".join(ARCHS)}'
    )


# -- Keys ----------------------------------------------------------------------------


def _place_all(
    state_dict: Dict[str, Tensor], arch: str, target: str
) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Map published keys to new ones, and dropped keys to reasons."""
    detector = any(key.startswith('backbone.') for key in state_dict)
    if detector and target == 'classifier':
        raise ValueError(
            'the checkpoint is from a detector and has no classifier; use '
            "target='detector' or target='backbone'"
        )
    stem = STEM
    if any('conv1.0.' in key for key in state_dict):
        ours = MMDET_STEM if target == 'detector' else MMPRETRAIN_STEM
        stem = dict(zip(DEEP_STEM, ours))
    mapped: Dict[str, str] = {}
    dropped: Dict[str, str] = {}
    unknown = []
    for key in state_dict:
        new, reason = _place(key, arch, target, detector, stem)
        if new and arch == 'kcla_unet' and _norm_of_bias(key) in state_dict:
            new, reason = '', 'folded into the mean of the next normalization'
        if new:
            mapped[key] = new
        elif reason:
            dropped[key] = reason
        else:
            unknown.append(key)
    _refuse_unknown(unknown, arch)
    twice = [key for key, count in Counter(mapped.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f'arch={arch!r}: several keys map to the same new key: {", ".join(twice)}'
        )
    return mapped, dropped


def _refuse_unknown(keys: Sequence[str], arch: str) -> None:
    if keys:
        raise ValueError(
            f'{len(keys)} keys are unknown for arch={arch!r}: {", ".join(keys)}'
        )


def _place(
    key: str, arch: str, target: str, detector: bool, stem: Dict[str, str]
) -> Tuple[str, str]:
    """The new key, or the reason to drop the key; both empty if it is unknown."""
    deit = arch.startswith('deit')
    if detector and key.startswith(DETECTOR_PARTS):
        if target == 'detector':
            return key, ''
        return '', 'part of the detector, not of its backbone'
    head = {'head': 'head.layers.head'} if deit else {'fc': 'head.fc'}
    classifier = _rename(key, head)
    if classifier and arch != 'kcla_unet' and not detector:
        if target == 'classifier':
            return classifier, ''
        return '', 'part of the classifier, which the target does not have'
    if arch == 'kcla_unet':
        decoder = _rename(key, UNET_DECODER)
        if decoder:
            return decoder, ''
    prefix = 'encoder.' if arch == 'kcla_unet' else 'backbone.' if detector else ''
    if not key.startswith(prefix):
        return '', ''
    name = key[len(prefix) :]
    if deit:
        new, reason = _place_in_deit(name, arch), ''
    else:
        new, reason = _place_in_resnet(name, arch, stem)
    return new and ('' if target == 'backbone' else 'backbone.') + new, reason


def _rename(key: str, names: Dict[str, str]) -> str:
    """Rename a key by its first part; empty if no name matches."""
    for old, new in names.items():
        if key == old or key.startswith(f'{old}.'):
            return new + key[len(old) :]
    return ''


def _place_in_deit(key: str, arch: str) -> str:
    match = _DEIT_KEY.fullmatch(key)
    if match is None:
        return _rename(key, DEIT)
    block, leaf = int(match['block']), match['leaf']
    inner = _rename(leaf, DEIT_BLOCK)
    if inner:
        return f'layers.{block}.{inner}'
    inner = _rename(leaf, NETWORKS[arch].names)
    return inner and f'{_deit_attention(block)}.{inner}'


def _place_in_resnet(key: str, arch: str, stem: Dict[str, str]) -> Tuple[str, str]:
    new = _rename(key, stem)
    if new:
        return new, ''
    if key.startswith(('finalbn.', 'bn2.')):
        return '', _UNREAD
    match = _STAGE_KEY.fullmatch(key) or _BLOCK_KEY.fullmatch(key)
    if match is None:
        return '', ''
    parts = match.groupdict()
    stage = int(parts['layer'] or int(parts['stage']) + 1)
    where = f'layer{stage}.{int(parts.get("block") or 0)}'
    leaf = match['leaf']
    new = _rename(leaf, BLOCK)
    if new and parts.get('part') != 'attention':
        return f'{where}.{new}', ''
    if parts.get('part') == 'attention':
        leaf = f'attention.{leaf}'
    new = _rename(leaf, NETWORKS[arch].names)
    if new == 'scales':
        return '', (
            'fixed scales of the heads, which mmela computes; their values match'
        )
    if where == 'layer1.0' and new.startswith('cross_stage.'):
        return '', f'{_UNREAD}: the first stage has no previous stage'
    # Published for block 11 of stage 3 of a ResNet-101
    if not where.endswith('.0') and new.startswith('cross_stage.reduce.'):
        return '', f'{_UNREAD}: the channels are the same within a stage'
    return new and f'{where}.layer_attn.{new}', ''


# -- Sizes ---------------------------------------------------------------------------


def _shape(tensors: Dict[str, Tensor], key: str, dims: int) -> Sequence[int]:
    """Shape of a tensor, which must have ``dims`` dimensions and not be empty."""
    if key not in tensors:
        raise ValueError(f'a key that shows the size of a part is missing: {key}')
    shape = tuple(tensors[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(
            f'{key} has shape {shape}; it must have {dims} dimensions and not be empty'
        )
    return shape


def _check_shape(
    tensors: Dict[str, Tensor], key: str, expected: Tuple[int, ...]
) -> None:
    """Check the shape of a tensor before a network of that size is built."""
    shape = _shape(tensors, key, len(expected))
    if shape != expected:
        raise ValueError(f'{key} has shape {shape}; expected {expected}')


def _count_blocks(tensors: Dict[str, Tensor]) -> Tuple[int, ...]:
    """Number of blocks of each stage of a ResNet."""
    numbers = {
        (int(match[1]), int(match[2]))
        for match in (re.match(r'layer(\d+)\.(\d+)\.', key) for key in tensors)
        if match
    }
    counts = Counter(stage for stage, _ in numbers)
    return tuple(counts[stage] for stage in range(1, 1 + max(counts, default=0)))


def _head_dim_of_kcla(
    state_dict: Dict[str, Tensor], arch: str, head_dim: Optional[int]
) -> int:
    """Channels of a head of KCLA; checks its fixed scales too."""
    scales = {}
    for key, value in state_dict.items():
        norm = state_dict.get(key[: -len('norm_d')] + 'bn_attention.weight')
        if key.endswith('.norm_d') and norm is not None:
            scales[key] = norm.numel() / max(1, value.numel())
    if not scales:
        raise ValueError('a key that shows the number of heads is missing: norm_d')
    dims = set(scales.values())
    if len(dims) != 1 or not min(dims).is_integer() or min(dims) < 1:
        raise ValueError(
            f'heads have {sorted(dims)} channels; mmela supports only networks whose '
            'heads all have the same number'
        )
    inferred = int(dims.pop())
    if head_dim not in (None, inferred):
        raise ValueError(
            f'head_dim={head_dim}, but the heads in the checkpoint have {inferred} '
            'channels'
        )
    root = math.sqrt(inferred) if arch == 'kcla_first' else 1.0
    for key in scales:
        _check_scales(key, state_dict[key], root)
    return inferred


def _check_scales(key: str, value: Tensor, root: float) -> None:
    """Check a fixed tensor of KCLA, which mmela computes rather than loads."""
    bound = -math.log(0.7)
    expected = torch.linspace(bound, -bound, value.numel()).exp()
    if root != 1:  # the first detectors
        expected = root / expected
    if not torch.allclose(value.flatten().float(), expected, atol=1e-3):
        low, high = (0.7 * root, root / 0.7) if root != 1 else (1 / 0.7, 0.7)
        raise ValueError(
            f'{key} starts with {value.flatten()[:4].tolist()}, but the published '
            f'values go from {low:.4g} to {high:.4g}; mmela has no attention with '
            'other values'
        )


def _reduction(tensors: Dict[str, Tensor], stages: int, name: str) -> int:
    """Reduction factor that the cells of all stages share."""
    sizes = [
        _shape(tensors, f'layer{stage}.0.layer_attn.{name}.input.0.weight', 2)
        for stage in range(1, stages + 1)
    ]
    for reduction in range(1, 1 + min(channels for _, channels in sizes)):
        if all(channels // reduction == width for width, channels in sizes):
            return reduction
    raise ValueError(
        f'cells with (width, channels) {sizes} have no common reduction factor'
    )


def _resnet_backbone(
    tensors: Dict[str, Tensor], arch: str, head_dim: Optional[int]
) -> dict:
    """Infer the config of a ResNet from its tensors."""
    blocks = _count_blocks(tensors)
    deep = 'conv1.weight' not in tensors
    cifar = not deep and _shape(tensors, 'conv1.weight', 4)[-1] == 3
    width, stem_width = _shape(tensors, 'layer1.0.conv1.weight', 4)[:2]
    channels = _shape(tensors, 'layer1.0.conv3.weight', 4)[0]
    inner = _shape(tensors, 'layer1.0.conv2.weight', 4)[1]
    for i in range(len(blocks)):
        size = (width << i, inner << i, 3, 3)
        # In a ResNeXt, the number of groups is the same in all stages
        _check_shape(tensors, f'layer{i + 1}.0.conv2.weight', size)
    cfg: dict = dict(type='ELABottleneckResNet_CIFAR' if cifar else 'ELAResNet')
    depth = _DEPTHS.get(blocks)
    if cifar:
        depth = 9 * blocks[0] + 2 if blocks == blocks[:1] * 3 else None
    if depth is None:
        raise ValueError(
            f'no published network has {blocks} blocks in its stages; known are '
            f'{", ".join(map(str, _DEPTHS))}, and on CIFAR three equal numbers'
        )
    cfg['depth'] = depth
    base = width
    if inner != width:
        cfg.update(type='ELAResNeXt', groups=width // inner, width_per_group=inner)
        base = channels // 4
    default = 16 if cifar else 64
    if stem_width != default:
        cfg['stem_channels'] = stem_width
    if base != default:
        cfg['base_channels'] = base
    if deep:
        cfg['deep_stem'] = True
    attention = cfg['layer_attention'] = dict(NETWORKS[arch].attention)
    if arch == 'dia':
        if head_dim is not None:
            raise ValueError(f'head_dim={head_dim} is set, but DIA has no heads')
    elif not arch.startswith('kcla'):
        head_dim = _choose_head_dim(arch, cifar, head_dim)
    if head_dim is not None:
        attention['head_dim'] = head_dim
    if arch in ('dla_light', 'dla_base', 'dia'):
        name = 'cell' if arch == 'dia' else 'dsu'
        attention['reduction'] = _reduction(tensors, len(blocks), name)
    restarts = [re.match(r'layer\d+\.(\d+)\..+\.cross_stage\.', key) for key in tensors]
    indices = {int(match[1]) for match in restarts if match} - {0}
    if indices:
        attention['restart_blocks'] = tuple(sorted(indices))
    return cfg


def _choose_head_dim(arch: str, cifar: bool, head_dim: Optional[int]) -> int:
    """The given ``head_dim``, or the only published one."""
    if head_dim is not None:
        return head_dim
    choices = NETWORKS[arch].cifar if cifar else NETWORKS[arch].imagenet
    if len(choices) == 1:
        return next(iter(choices))
    known = ' or '.join(f'{value} ({where})' for value, where in choices.items())
    raise ValueError(
        'the checkpoint does not show how many channels a head has; set head_dim. '
        f'Published for arch={arch!r} on {"CIFAR" if cifar else "ImageNet or COCO"}: '
        f'{known or "none"}'
    )


def _deit_backbone(
    tensors: Dict[str, Tensor], arch: str, head_dim: Optional[int]
) -> dict:
    """Infer the config of a vision transformer from its tensors."""
    _, tokens, dims = _shape(tensors, 'pos_embed', 3)
    patch = _shape(tensors, 'patch_embed.projection.weight', 4)[-1]
    _check_shape(tensors, 'patch_embed.projection.weight', (dims, 3, patch, patch))
    _check_shape(tensors, 'layers.0.attn.qkv.weight', (3 * dims, dims))
    feedforward = _shape(tensors, 'layers.0.ffn.layers.1.weight', 2)[1]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(
            f'pos_embed has {tokens} tokens, which is not a square map plus a class '
            'token'
        )
    depth = len({key.split('.')[1] for key in tensors if key.startswith('layers.')})
    cfg: dict = dict(type='ELAVisionTransformer', arch=_DEIT_NAMES.get(dims))
    if cfg['arch'] is None or depth != 12 or feedforward != 4 * dims:
        cfg['arch'] = dict(
            embed_dims=dims,
            num_layers=depth,
            # 64 channels per head, as in all published networks
            num_heads=max(1, dims // 64),
            feedforward_channels=feedforward,
        )
    cfg.update(img_size=side * patch, patch_size=patch)
    cfg['layer_attention'] = dict(NETWORKS[arch].attention)
    if head_dim is not None:
        cfg['layer_attention']['head_dim'] = head_dim
    return cfg


def _unet_backbone(
    tensors: Dict[str, Tensor], arch: str, head_dim: Optional[int]
) -> dict:
    """Infer the config of a U-Net's encoder from its tensors."""
    blocks = _count_blocks(tensors)
    if blocks != (2, 2, 2, 2):
        raise ValueError(
            f'no published U-Net has {blocks} blocks in its stages; known are '
            '(2, 2, 2, 2)'
        )
    widths = []
    for stage in range(1, 5):
        name = f'layer{stage}.0.conv2.weight'
        width = _shape(tensors, name, 4)[0]
        _check_shape(tensors, name, (width, width, 3, 3))
        widths.append(width)
    attention = dict(NETWORKS[arch].attention, head_dim=head_dim)
    # The first version has one convolution for all heads. The newest has one per
    # head, and there later blocks of a stage do not see earlier ones.
    carried = _shape(tensors, 'layer2.0.layer_attn.cross_stage.reduce.weight', 4)
    attention['cross_stage_groups'] = carried[1] != widths[0]
    attention['accumulate'] = carried[1] == widths[0]
    return dict(
        type='ELAUNetResNet',
        depth=18,
        stem_channels=_shape(tensors, 'conv1.weight', 4)[0],
        stage_channels=tuple(widths),
        layer_attention=attention,
    )


def _norm_of_bias(key: str) -> str:
    """Key of the running mean of the norm after a convolution with this bias."""
    match = _BIAS.fullmatch(key)
    return f'{match[1]}{int(match[2]) + 1}.running_mean' if match else ''


def _fold_unet(
    tensors: Dict[str, Tensor], state_dict: Dict[str, Tensor], mapped: Dict[str, str]
) -> None:
    """Fold biases into the mean of the next norm; duplicate shared keys."""
    for key, bias in state_dict.items():
        mean = _norm_of_bias(key)
        if mean in mapped:
            value = tensors[mapped[mean]]
            if bias.shape != value.shape:
                raise ValueError(
                    f'{key} has shape {tuple(bias.shape)}, but {mean} has '
                    f'{tuple(value.shape)}'
                )
            tensors[mapped[mean]] = value - bias
    for key in list(tensors):
        where, separator, _ = key.partition('.cross_stage.norm.weight')
        if separator and f'{where}.key.weight' in tensors:
            tensors[f'{where}.cross_stage.key.weight'] = tensors[f'{where}.key.weight']


# -- The network ---------------------------------------------------------------------


def _build(backbone: dict, tensors: Dict[str, Tensor], target: str) -> nn.Module:
    """Build the target network; for a detector, only its backbone."""
    toolbox = TARGETS[target]
    if target == 'detector' and not backbone['type'].startswith('ELAResNe'):
        raise ValueError(
            "target='detector' is for ResNets for ImageNet and COCO; for "
            f"{backbone['type']} use target='classifier' or target='backbone'"
        )
    try:
        registry = import_module(f'{toolbox}.registry').MODELS
    except ImportError as error:
        raise ImportError(
            f'target={target!r} needs {toolbox}, which is not installed'
        ) from error
    cfg = backbone
    if target == 'classifier':
        cfg = dict(type='ImageClassifier', backbone=backbone)
        if 'head.layers.head.weight' in tensors or 'cls_token' in tensors:
            classes, width = _shape(tensors, 'head.layers.head.weight', 2)
            head = 'VisionTransformerClsHead'
        else:
            classes, width = _shape(tensors, 'head.fc.weight', 2)
            head = 'LinearClsHead'
            cfg['neck'] = dict(type='GlobalAveragePooling')
        cfg['head'] = dict(type=head, num_classes=classes, in_channels=width)
    elif target == 'segmentor':
        cfg = dict(type='EncoderDecoder', backbone=backbone)
        cfg['decode_head'] = _unet_head(backbone, tensors)
    try:
        with torch.random.fork_rng(devices=()):
            with DefaultScope.overwrite_default_scope(toolbox):
                network = registry.build(cfg)
    except Exception as error:  # odd sizes may make a constructor raise anything
        raise ValueError(
            f'target={target!r} cannot build a network of these sizes, {backbone}: '
            f'{error}'
        ) from error
    return nn.ModuleDict({'backbone': network}) if target == 'detector' else network


def _unet_head(backbone: dict, tensors: Dict[str, Tensor]) -> dict:
    """Infer the config of a U-Net's decoder from its tensors."""
    below = [backbone['stem_channels'], *backbone['stage_channels']]
    channels: List[int] = []
    for step in range(4):
        out = _shape(tensors, f'decode_head.steps.{step}.1.conv.weight', 4)[0]
        _check_shape(
            tensors, f'decode_head.steps.{step}.1.conv.weight', (out, out, 3, 3)
        )
        channels.append(out)
    classes = _shape(tensors, 'decode_head.conv_seg.weight', 4)[0]
    return dict(
        type='UNetHead',
        in_channels=below,
        decoder_channels=channels,
        num_classes=max(2, classes),
        out_channels=classes,
        threshold=0.5 if classes == 1 else None,
        scale=2,
        align_corners=True,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=classes == 1, avg_non_ignore=True
        ),
    )


def _load(
    network: nn.Module,
    tensors: Dict[str, Tensor],
    mapped: Dict[str, str],
    arch: str,
    target: str,
) -> Dict[str, Tensor]:
    """Load tensors that must match key by key.

    Args:
        network (nn.Module): The network.
        tensors (dict[str, Tensor]): Its tensors.
        mapped (dict[str, str]): Published keys, mapped to new keys, for messages.
        arch (str): The architecture, for messages.
        target (str): The target, for messages.

    Returns:
        dict[str, Tensor]: The whole state dict, including keys that published
        networks lack.
    """
    expected = network.state_dict()
    published = {new: old for old, new in mapped.items()}
    _refuse_unknown([published[key] for key in tensors if key not in expected], arch)
    lacking = [key for key in expected if key not in tensors]
    missing = sorted(key for key in lacking if not key.endswith(_OWN))
    if missing:
        raise ValueError(
            f'{len(missing)} keys that arch={arch!r}, target={target!r} needs are '
            f'missing: {", ".join(missing)}'
        )
    result = {}
    for key, initial in expected.items():
        value = tensors.get(key, initial)
        if key.endswith(_RESHAPED) and value.numel() == initial.numel():
            value = value.reshape(initial.shape)
        if value.shape != initial.shape:
            raise ValueError(
                f'{published[key]} has shape {tuple(value.shape)}, but {key} in a '
                f'network of arch={arch!r} has {tuple(initial.shape)}'
            )
        result[key] = value
    network.load_state_dict(result, strict=True)
    return result
