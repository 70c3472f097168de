"""Self-attention of a patch, against what the network itself computes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mmela.analysis.patch_attention import patch_attention  # noqa: E402
from tests.helpers.networks import transformer  # noqa: E402


def network(**kwargs):
    model = transformer(None, **kwargs)
    for parameter in model.parameters():  # or all weights would be about the same
        nn.init.normal_(parameter, std=0.5)
    return model


def batch():
    image = torch.randint(256, (3, 32, 48), dtype=torch.uint8)
    return dict(inputs=[image])


CASES = {
    'VisionTransformer': ({}, 1),
    'DistilledVisionTransformer': ({}, 2),
    'ELAVisionTransformer': (
        dict(layer_attention=dict(type='MRLALight', head_dim=4), layers_per_stage=2),
        1,
    ),
    'no class token': (
        dict(with_cls_token=False, out_type='avg_featmap'),
        0,
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_network(name):
    kwargs, extra = CASES[name]
    if ' ' not in name:
        kwargs = dict(kwargs, type=name)
    model = network(**kwargs)
    seen = []

    def attend(query, key, value, dropout_p=0.0):
        logits = query @ key.transpose(-1, -2) / math.sqrt(4)
        seen.append(logits.softmax(-1)[0])
        return seen[-1][None] @ value

    for layer in model.backbone.layers:
        layer.attn.scaled_dot_product_attention = attend
    # 4 x 6 patches: six tenths of six columns, three of four rows
    found = patch_attention(model, batch(), ['layers.1', 'layers.0'], (0.6, 0.3))
    assert set(found) == {'layers.0', 'layers.1'}
    for index in range(2):
        look = found[f'layers.{index}']
        assert look.patch == (1, 3)
        row = seen[index][:, extra + 1 * 6 + 3].detach()
        assert look.weights.shape == (3, 4, 6) and look.weights.std() > 1e-3
        np.testing.assert_allclose(
            look.weights, row[:, extra:].reshape(3, 4, 6), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(look.extra, row[:, :extra].sum(1), atol=1e-6)
    assert patch_attention(model, batch(), ['layers.0'], (1, 1))['layers.0'].patch == (
        3,
        5,
    )
    for module in (model.backbone.patch_embed, model.backbone.layers[0].attn.qkv):
        hooks = len(module._forward_hooks)
        assert hooks == (module is model.backbone.patch_embed and 'ELA' in name)


@pytest.mark.parametrize(
    'layer, query, match',
    [
        ('layers.1', (0.5, 1.2), '0.5 1.2 is outside the image'),
        ('layers.2', (0.5, 0.5), 'no layer layers.2; .*layers.0, layers.1'),
    ],
)
def test_errors(layer, query, match):
    model = network()
    with pytest.raises(ValueError, match=match):
        patch_attention(model, batch(), ['layers.0', layer], query)
    assert not any(m._forward_hooks for m in model.modules())


def test_no_transformer():
    model = nn.Module()
    model.backbone = nn.Linear(1, 1)
    with pytest.raises(ValueError, match='Linear is not a vision transformer'):
        patch_attention(model, batch(), ['layers.0'], (0.5, 0.5))
