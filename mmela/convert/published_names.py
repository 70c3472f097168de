"""Tables that map names in published networks to names in mmela.

A name stands for all tensors below it.
"""

from typing import Dict, NamedTuple


def _below(prefix: str, names: Dict[str, str], ours: str = '') -> Dict[str, str]:
    """Add prefixes to the names of a table."""
    return {f'{prefix}{old}': f'{ours}{new}' for old, new in names.items()}


_QKV = {'Wq': 'query', 'Wk': 'key', 'Wv': 'value'}
BLOCK = {
    **{name: name for name in ('conv1', 'conv2', 'conv3', 'bn1', 'bn2', 'bn3')},
    **{name: name for name in ('downsample.0', 'downsample.1')},
}
# Names of attentions are relative to the block
MRLA = {**_below('mrla.mrla.', _QKV), 'bn_mrla': 'norm'}
_LIGHT = {
    **MRLA,
    **_below('mrla.mla.', _QKV),  # older files, including detectors
    'mrla.lambda_t': 'lambda_o',
}
_FOCUSED = {
    **MRLA,
    'mrla.mrla.positional_encoding': 'position',
    'mrla.mrla.scale': 'spread',
}
_EQ4 = {**_below('la.', _QKV), 'bn_la': 'norm'}
# Fixed numbers that are checked and dropped
_SCALES = {'norm_d': 'scales'}
_KCLA = {
    **_QKV,
    **_SCALES,
    'bn_attention': 'norm',
    'head_att': 'head_attention',
    'adjust_channel': 'cross_stage.reduce',
    'u_bn': 'cross_stage.norm',
    'u_Wk': 'cross_stage.key',
}
_KCLA_FIRST = {
    **_QKV,
    **_SCALES,
    'bn_attention': 'norm',
    'select_temp': 'head_attention',
    'adjust_channel.0': 'cross_stage.reduce',
    'membn': 'cross_stage.norm',
    'memWk': 'cross_stage.key',
}
_KCLA_UNET = {
    **_QKV,
    **_SCALES,
    'bn_attention': 'norm',
    'adjust_channel.0': 'cross_stage.reduce',
    'adjust_channel.1': 'cross_stage.norm',
}
# Shared by a stage; the first attention of the stage holds it
_CELL = {'lstm.w_ih.0.seq': 'input', 'lstm.w_hh.0.seq': 'hidden'}
_DLA_BASE = {
    **_below('attention.layer_attention.layer_attention.', _QKV),
    'attention.bn_layer_attention': 'norm',
    **_below('', _CELL, 'dsu.'),
}
_DLA_LIGHT = {
    **_DLA_BASE,
    **_below('attention.layer_attention.mrla.', _QKV),  # ImageNet and COCO
    'attention.layer_attention.lambda_t': 'lambda_o',
    'excite': 'refresh',
    'extict': 'refresh',  # ImageNet
}
DEIT_BLOCK = {
    'norm1': 'ln1',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'norm2': 'ln2',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}
_DEIT_BASE = {**_below('mrla.mrla.', _QKV), 'mrla.normx': 'pre_norm'}
_DEIT_LIGHT = {
    **_DEIT_BASE,
    **_below('mrla.mla.', _QKV),  # older files
    'mrla.normo': 'identity_norm',
    'mrla.lambda_t': 'lambda_o',
}
DEIT = {
    'cls_token': 'cls_token',
    'pos_embed': 'pos_embed',
    'patch_embed.proj': 'patch_embed.projection',
    'norm': 'ln1',
}
STEM = {'conv1': 'conv1', 'bn1': 'bn1'}
DEEP_STEM = ('conv1.0', 'conv1.1', 'conv1.3', 'conv1.4', 'conv1.6', 'bn1')
# mmpretrain has three ConvModules, mmdet a plain sequence that includes the ReLUs
MMPRETRAIN_STEM = tuple(f'stem.{i}.{part}' for i in range(3) for part in ('conv', 'bn'))
MMDET_STEM = tuple(f'stem.{i}' for i in (0, 1, 3, 4, 6, 7))
UNET_DECODER = {'outc.conv': 'decode_head.conv_seg'}
for _step, _i in ((step, i) for step in range(4) for i in (0, 1)):
    _old, _new = f'up{_step + 1}.conv.double_conv', f'decode_head.steps.{_step}.{_i}'
    UNET_DECODER[f'{_old}.{3 * _i}'] = f'{_new}.conv'
    UNET_DECODER[f'{_old}.{3 * _i + 1}'] = f'{_new}.bn'
DETECTOR_PARTS = ('neck.', 'rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.')


class Published(NamedTuple):
    """A published network.

    Attributes:
        attention (dict): Config of its layer attention.
        names (dict[str, str]): Names within a block and within the attention.
        imagenet (dict[int, str]): Values of ``head_dim`` used on ImageNet and COCO,
            with their source, for networks whose tensors do not show it.
        cifar (dict[int, str]): The same for CIFAR.
        note (str): Differences from the published network other than names.
    """

    attention: dict
    names: Dict[str, str]
    imagenet: Dict[int, str] = {}
    cifar: Dict[int, str] = {}
    note: str = ''


_OF_CIFAR = {16: "KCLA's code", 32: "DLA's code, sometimes KCLA's"}
_OF_BASE = {16: 'by default', 1: 'with channel_wise_mrla=True'}
_DEIT_NOTE = (
    'in training, mmela gives the attention the stochastic depth of its block; in the '
    "authors' code the attention has none, and with MRLA-base every block has 0.1"
)
NETWORKS: Dict[str, Published] = dict(
    mrla_base=Published(dict(type='MRLABase'), MRLA, _OF_BASE, _OF_CIFAR),
    mrla_base_no_relu=Published(dict(type='MRLABase', relu=False), MRLA, _OF_BASE),
    mrla_light=Published(dict(type='MRLALight'), _LIGHT, {32: ''}, _OF_CIFAR),
    mla=Published(dict(type='MLA'), MRLA, {}, _OF_CIFAR),
    mla_eq4=Published(dict(type='MLA', replace=True, mixed_heads=True), _EQ4, {32: ''}),
    linear=Published(dict(type='LinearizedMLA'), MRLA, {}, {8: ''}),
    linear_no_relu=Published(dict(type='LinearizedMLA', relu=False), MRLA, {}, {8: ''}),
    hydra=Published(
        dict(type='LinearizedMLA', kind='hydra', relu=False), MRLA, {}, {16: ''}
    ),
    focused=Published(
        dict(type='LinearizedMLA', kind='focused', relu=False), _FOCUSED, {}, {16: ''}
    ),
    kcla=Published(
        dict(type='KCLA'), {**_below('kcla.', _KCLA), **_below('attention.', _KCLA)}
    ),
    # Temperatures in reverse order, and the direction of the sum of all keys so far
    kcla_first=Published(
        dict(type='KCLA', temperature=1 / 0.7, direction='sum'),
        _below('attention.', _KCLA_FIRST),
    ),
    kcla_unet=Published(
        dict(
            type='KCLA',
            temperature=1 / 0.7,
            head_attention='plain',
            relu=False,
            eps=0.0,
            shared_key=True,
        ),
        _below('attention.', _KCLA_UNET),
        note='decode_head=dict(scale=2) enlarges like the published decoder',
    ),
    dla_light=Published(dict(type='DLALight'), _DLA_LIGHT, {32: ''}, _OF_CIFAR),
    dla_base=Published(dict(type='DLABase'), _DLA_BASE, {}, _OF_CIFAR),
    dia=Published(dict(type='DIA'), _below('', _CELL, 'cell.')),
    # Algorithm 2 has no GELU
    deit_mrla_base=Published(
        dict(type='MRLABase', head_dim=16, value_act_cfg=None),
        _DEIT_BASE,
        note=_DEIT_NOTE,
    ),
    deit_mrla_light=Published(
        dict(type='MRLALight', head_dim=16), _DEIT_LIGHT, note=_DEIT_NOTE
    ),
)
# Parts of keys that identify a network, the most specific ones first
SIGNS = (
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
    ('focused', {'bn_mrla', 'positional_encoding'}),
)
