"""Small networks from all sources, and every registered layer attention."""

import copy
from functools import lru_cache
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmela import attach_layer_attention
from mmela.convert.slim import slim_state_dict
from mmela.hooks import NetworkKLMeter
from mmela.layers import LinearizedMLA
from mmela.structure import attention_stages, layer_attentions
from tests.helpers.attachable import Nested, Patches, TwoBranches

AFTER_BLOCKS = {
    'MRLABase': dict(type='MRLABase'),
    'MRLALight': dict(type='MRLALight'),
    'MRLALight-output': dict(type='MRLALight', previous='output'),
    'MLA': dict(type='MLA'),
    'MLA-replace': dict(type='MLA', replace=True),
    'KCLA': dict(type='KCLA'),
    'KCLA-within': dict(type='KCLA', cross_stage=False, recurrent=True),
    'AttnRes': dict(type='AttnRes', total='sum'),
    'AttnRes-groups': dict(
        type='AttnRes', per='image', heads=2, every=2, norm_weight=True
    ),
    'DLABase': dict(type='DLABase', reduction=4),
    'DLALight': dict(type='DLALight', reduction=4),
    'linear': dict(type='LinearizedMLA'),
    'focused': dict(type='LinearizedMLA', kind='focused'),
    'hydra': dict(type='LinearizedMLA', kind='hydra'),
    'performer': dict(type='LinearizedMLA', kind='performer'),
    'linformer': dict(type='LinearizedMLA', kind='linformer'),
}
"""Attentions that follow a block of any network."""

WITHIN_BLOCKS = {
    'DIA': dict(type='DIA'),
    'BA': dict(type='BA', reduction=4),
    'RLAg': dict(type='RLAg', hidden=8),
    'AA': dict(type='AA', heads=2, min_key=4),
    'Plugin': dict(type='Plugin', plugin=dict(type='SqueezeExcitation', reduction=4)),
}
"""Attentions within the residual blocks of the ResNet family."""

ATTENTIONS = {**AFTER_BLOCKS, **WITHIN_BLOCKS}
PAPERS = ('MLA', 'MRLABase', 'MRLALight', 'KCLA', 'AttnRes')
"""Attentions of the papers; the others are variants of them."""

STARTS_PLAIN = [
    name for name in AFTER_BLOCKS if name not in ('MLA-replace', 'AttnRes-groups')
]
"""Attentions that do not change the outputs of the network with ``zero_init``."""


class Kind(NamedTuple):
    """A network of the zoo: its constructor and its input."""

    make: Callable[[], nn.Module]
    size: Tuple[int, int] = (48, 64)


def toolbox(scope: str, type: str, **kwargs) -> Callable[[], nn.Module]:
    def make():
        if scope == 'mmdet':
            pytest.importorskip('mmcv.ops', exc_type=ImportError)
        pytest.importorskip(f'{scope}.models')
        with DefaultScope.overwrite_default_scope(scope):
            return MODELS.build(dict(type=f'{scope}.{type}', **copy.deepcopy(kwargs)))

    return make


def timm(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip('timm').create_model(name, **kwargs)


def torchvision(name: str, **kwargs) -> Callable[[], nn.Module]:
    def make():
        models = pytest.importorskip('torchvision.models')
        return getattr(models, name)(weights=None, **kwargs)

    return make


RESNET = dict(depth=18, base_channels=16, stem_channels=16)
BOTTLENECKS = dict(
    depth=50,
    base_channels=8,
    stem_channels=8,
    # Two of four stages, with 3 and 4 blocks
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
)
VIT = dict(embed_dims=32, num_layers=5, num_heads=2, feedforward_channels=64)
SWIN = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4))
CONVNEXT = dict(depths=[2, 2, 2, 2], channels=[8, 16, 24, 32])


def hrnet_stage(branches: int, blocks: int, kind: str = 'BASIC') -> dict:
    return dict(
        num_modules=1,
        num_branches=branches,
        block=kind,
        num_blocks=(blocks,) * branches,
        num_channels=tuple(8 * 2**i for i in range(branches)),
    )


HRNET = dict(
    stage1=hrnet_stage(1, 2, 'BOTTLENECK'),
    **{f'stage{n}': hrnet_stage(n, 2) for n in (2, 3, 4)},
)

TOOLBOXES: Dict[str, Kind] = {
    'mmdet.ResNet': Kind(toolbox('mmdet', 'ResNet', norm_eval=False, **BOTTLENECKS)),
    'mmdet.RegNet': Kind(
        toolbox(
            *('mmdet', 'RegNet'),
            arch=dict(w0=16, wa=16.0, wm=2.0, group_w=8, depth=7, bot_mul=1.0),
            norm_eval=False,
        )
    ),
    'mmdet.HRNet': Kind(
        toolbox('mmdet', 'HRNet', extra=HRNET, norm_eval=False), (64, 96)
    ),
    'mmdet.CSPDarknet': Kind(
        toolbox('mmdet', 'CSPDarknet', widen_factor=0.125, deepen_factor=0.67)
    ),
    'mmdet.SwinTransformer': Kind(toolbox('mmdet', 'SwinTransformer', **SWIN)),
    'mmdet.PVTv2': Kind(
        toolbox(
            *('mmdet', 'PyramidVisionTransformerV2'),
            embed_dims=8,
            num_layers=[2, 2, 2, 2],
        )
    ),
    'mmpretrain.ResNet': Kind(toolbox('mmpretrain', 'ResNet', **RESNET)),
    'mmpretrain.ConvNeXt': Kind(
        toolbox('mmpretrain', 'ConvNeXt', arch=CONVNEXT, drop_path_rate=0.0), (64, 96)
    ),
    'mmpretrain.EfficientNet': Kind(toolbox('mmpretrain', 'EfficientNet', arch='b0')),
    'mmpretrain.ViT': Kind(
        toolbox(
            *('mmpretrain', 'VisionTransformer'),
            arch=VIT,
            img_size=(32, 48),
            patch_size=8,
        ),
        (32, 48),
    ),
    'mmseg.ResNetV1c': Kind(toolbox('mmseg', 'ResNetV1c', norm_eval=False, **RESNET)),
    'mmseg.UNet': Kind(toolbox('mmseg', 'UNet', base_channels=4), (32, 48)),
}

OTHERS: Dict[str, Kind] = {
    'timm.resnet': Kind(timm('resnet18', num_classes=4)),
    'timm.features': Kind(timm('resnet18', features_only=True)),
    'timm.efficientnet': Kind(timm('efficientnet_lite0', num_classes=4)),
    'timm.convnext': Kind(timm('test_convnext'), (64, 96)),
    'timm.vit': Kind(timm('test_vit', img_size=(64, 96)), (64, 96)),
    'timm.pvt': Kind(timm('pvt_v2_b0', num_classes=4), (64, 96)),
    'torchvision.resnet18': Kind(torchvision('resnet18', num_classes=4)),
    'torchvision.mobilenet_v2': Kind(
        torchvision('mobilenet_v2', width_mult=0.25, num_classes=4)
    ),
    'torchvision.swin': Kind(
        lambda: pytest.importorskip('torchvision.models').SwinTransformer(
            patch_size=[4, 4],
            embed_dim=16,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=[4, 4],
            num_classes=4,
        )
    ),
    'own.maps': Kind(Nested, (16, 24)),
    'own.branches': Kind(TwoBranches, (16, 24)),
    'own.tokens': Kind(lambda: Patches(8, 1), (16, 24)),
    'own.channels-last': Kind(lambda: Patches(8, last=True), (16, 24)),
}

NETWORKS: Dict[str, Kind] = {**TOOLBOXES, **OTHERS}

ONE_OF_EACH = (
    'mmdet.ResNet',
    'mmpretrain.ViT',
    'mmseg.UNet',
    'timm.efficientnet',
    'torchvision.resnet18',
    'own.maps',
)
"""One network from each source, for slow tests."""

RESNETS = ('mmdet.ResNet', 'mmpretrain.ResNet', 'mmseg.ResNetV1c')
"""Networks that fit attentions within their blocks."""


def plain(name: str, seed: int = 0) -> nn.Module:
    """A network of the zoo with weights and statistics as after training."""
    network = copy.deepcopy(_made(name, seed))
    torch.manual_seed(seed)  # for what is attached, whether it was made now or not
    return network


@lru_cache(maxsize=None)
def _made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = stir(NETWORKS[name].make(), seed)
    network.eval()  # which returns None in some toolboxes
    return network


def image(name: str, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *NETWORKS[name].size, generator=generator)


def attach(network: nn.Module, name: str, attention: str = 'MRLABase', **kwargs):
    """Attach attentions to a network of the zoo, with weights as after training."""
    options = {k: kwargs.pop(k) for k in ('blocks',) if k in kwargs}
    config = dict(ATTENTIONS[attention], **kwargs)
    attach_layer_attention(network, config, input_size=NETWORKS[name].size, **options)
    if not kwargs.get('zero_init'):
        for seed, module in enumerate(layer_attentions(network).values()):
            stir(module, seed)  # each with a different seed
    return network


def attached(name: str, attention: str = 'MRLABase', **kwargs) -> nn.Module:
    """A network of the zoo with attentions, in eval mode."""
    network = attach(plain(name), name, attention, **kwargs)
    network.eval()
    return network


def stir(network: nn.Module, seed: int = 0) -> nn.Module:
    """Change norms and queries as if trained, so that nothing is 0, 1 or uniform."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        if tensor is not None and not tensor.is_meta:
            new = torch.rand(tensor.shape, generator=generator) * (high - low) + low
            tensor.data.copy_(new)

    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            draw(module.running_mean, -0.2, 0.2)
            draw(module.running_var, 0.5, 1.5)
        if hasattr(module, 'bias') and isinstance(module.bias, nn.Parameter):
            draw(module.bias, -0.2, 0.2)
        if getattr(module, 'weight', None) is not None and module.weight.dim() == 1:
            draw(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Conv1d):
            draw(module.weight, -1.5, 1.5)
        if isinstance(getattr(module, 'scale', None), nn.Parameter):
            draw(module.scale, 0.5, 1.5)
        if isinstance(getattr(module, 'query', None), nn.Parameter):
            draw(module.query, -1.5, 1.5)
    for module in network.modules():
        if isinstance(module, LinearizedMLA):
            # Their weights are not normalized, so the sum would soon overflow
            module.value.weight.data.mul_(0.01)
    return network


def tensors(output) -> List[Tensor]:
    """List all tensors in a network's output of any structure."""
    if torch.is_tensor(output):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    return [t for part in output if part is not None for t in tensors(part)]


def run(network: nn.Module, x: Tensor) -> List[Tensor]:
    """Outputs of a network, without gradients."""
    with torch.no_grad():
        return [t.clone() for t in tensors(network(x))]


def equal(one: List[Tensor], other: List[Tensor]) -> bool:
    """Whether two outputs are bit for bit the same."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def gap(one: List[Tensor], other: List[Tensor]) -> float:
    """Largest difference of two outputs, relative to the largest number."""
    assert [t.shape for t in one] == [t.shape for t in other]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other))


def states(network: nn.Module) -> List[int]:
    return [int(a.attention_state) for a in layer_attentions(network).values()]


def some(network: nn.Module, first: int = 1) -> List[str]:
    """Every second attention of a network."""
    return list(layer_attentions(network))[first::2]


def decide(network: nn.Module, x: Tensor, *policies) -> list:
    """Decisions of pruning policies after one batch."""
    meter = NetworkKLMeter(attention_stages(network))
    meter.attach()
    run(network, x)
    meter.detach()
    return [meter.decide(policy) for policy in policies]


def slim(network: nn.Module, build: Callable[..., nn.Module]) -> nn.Module:
    """The network without its pruned attentions, built with ``blocks``."""
    state_dict, blocks = slim_state_dict(network)
    network = build(blocks=blocks[''])
    network.load_state_dict(state_dict, strict=True)
    network.eval()
    return network


def snapshot(network: nn.Module) -> Dict[str, Optional[object]]:
    """Everything attaching could change: modules, tensors, hooks and modes."""
    seen: Dict[str, object] = {}
    for name, module in network.named_modules():
        seen[name] = (module, type(module), module.training, sorted(vars(module)))
        for kind in [k for k in vars(module) if k.endswith(('hooks', 'with_kwargs'))]:
            seen[f'{name}:{kind}'] = list(getattr(module, kind) or ())
        seen[f'{name}:forward'] = vars(module).get('forward')
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        what = (value, value._version, value.requires_grad, sorted(vars(value)))
        seen[f'{name}='] = (*what, value.detach().clone(), value.grad)
    return seen


def assert_same_snapshot(network: nn.Module, before: Dict[str, object]) -> None:
    after = snapshot(network)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if not key.endswith('='):
            assert after[key] == value, key
            continue
        assert after[key][0] is value[0] and after[key][1:4] == value[1:4], key
        assert torch.equal(after[key][4], value[4]), key
        assert after[key][5] is value[5], key
