import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('mmpretrain')

from mmpretrain.registry import MODELS  # noqa: E402

import mmela  # noqa: E402, F401
from mmela.structure import attention_stages  # noqa: E402

SMALL = dict(embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=24)


def build(**kwargs):
    cfg = dict(type='CeiT', arch=SMALL, img_size=(32, 64), stem_channels=8)
    return MODELS.build(dict(cfg, **kwargs))


def randomize(net):
    torch.manual_seed(0)
    for param in net.parameters():
        torch.nn.init.normal_(param, 0.02, 0.3)
    for name, buffer in net.named_buffers():
        if name.endswith('running_var'):
            torch.nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith('running_mean'):
            torch.nn.init.normal_(buffer)


def reference(state, images, heads=2, layers=3):
    """CeiT in evaluation mode from the paper, on the tensors alone."""

    def linear(name, x):
        return x @ state[f'{name}.weight'].flatten(1).T + state[f'{name}.bias']

    def layer_norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f'{name}.weight'] + state[f'{name}.bias']

    def batch_norm(name, x):  # channels last
        x = (x - state[f'{name}.running_mean']) / (
            state[f'{name}.running_var'] + 1e-5
        ).sqrt()
        return x * state[f'{name}.weight'] + state[f'{name}.bias']

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attention(name, x):
        qkv = linear(f'{name}.qkv', x).chunk(3, -1)
        out = []
        for q, k, v in zip(*(y.chunk(heads, -1) for y in qkv)):
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            out.append(scores.softmax(-1) @ v)
        return linear(f'{name}.proj', torch.cat(out, -1))

    x = F.conv2d(images, state['patch_embed.conv.weight'], None, 2, 3)
    x = batch_norm('patch_embed.bn', x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = F.max_pool2d(x, 3, 2, 1)
    x = x.unfold(2, 4, 4).unfold(3, 4, 4)  # B C H W 4 4
    height, width = x.shape[2:4]
    x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = linear('patch_embed.projection', x)
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x], 1)
    x = x + state['pos_embed']
    tokens = []
    for i in range(layers):
        name = f'layers.{i}'
        x = x + attention(f'{name}.attn', layer_norm(f'{name}.ln1', x))
        y = layer_norm(f'{name}.ln2', x)
        name = f'{name}.ffn.layers'
        patches = gelu(batch_norm(f'{name}.1', linear(f'{name}.0', y[:, 1:])))
        padded = F.pad(patches.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
        kernel = state[f'{name}.3.weight'][:, 0]
        mixed = sum(
            padded[:, a : a + height, b : b + width] * kernel[:, a, b]
            for a in range(3)
            for b in range(3)
        )
        mixed = mixed.flatten(1, 2) + state[f'{name}.3.bias']
        patches = linear(f'{name}.6', gelu(batch_norm(f'{name}.4', mixed)))
        patches = batch_norm(f'{name}.7', patches)
        x = x + torch.cat([y[:, :1], patches], 1)
        tokens.append(x[:, 0])
    # All tokens are computed here, and the last is taken
    x = torch.stack(tokens, 1) + state['lca.pos_embed']
    x = x + attention('lca.attn', layer_norm('lca.ln1', x))
    y = gelu(linear('lca.ffn.layers.0.0', layer_norm('lca.ln2', x)))
    x = x + linear('lca.ffn.layers.1', y)
    return layer_norm('ln1', x[:, -1])


def test_forward_pass():
    net = build()
    randomize(net)
    net.double().eval()
    images = torch.randn(2, 3, 32, 64, dtype=torch.double)
    with torch.no_grad():
        found = net(images)
        expected = reference(net.state_dict(), images)
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    'arch, dims, attention, millions',
    [
        ('tiny', 192, None, '6.4'),
        ('tiny', 192, 'MRLABase', '6.4'),
        ('tiny', 192, 'MRLALight', '6.4'),
        ('small', 384, None, '24.2'),
        ('small', 384, 'MRLALight', '24.3'),
    ],
)
def test_parameters_of_the_papers(arch, dims, attention, millions):
    """CeiT, table 2, and MRLA, table 1, with the classifier."""
    cfg = dict(type='CeiT', arch=arch)
    if attention:
        cfg = dict(
            type='ELACeiT',
            arch=arch,
            layer_attention=dict(type=attention, head_dim=16),
        )
    net = MODELS.build(cfg)
    count = sum(p.numel() for p in net.parameters()) + 1000 * (dims + 1)
    assert f'{count / 1e6:.1f}' == millions


def test_everything_is_trained():
    net = build(type='ELACeiT', layer_attention=dict(type='MRLABase', head_dim=8))
    net.train()
    net(torch.rand(2, 3, 32, 64))[0].square().sum().backward()
    for name, param in net.named_parameters():
        assert param.requires_grad and param.grad is not None, name


def test_class_tokens_are_those_after_the_layer_attention():
    """Each token gets its own normalized value (MRLA, algorithm 2)."""
    attention = dict(type='MRLABase', head_dim=8)
    net = build(type='ELACeiT', layer_attention=attention, layers_per_stage=2)
    randomize(net)
    net.eval()
    seen = []
    net.lca.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs = []
    for layer in net.layers:
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[:, 0])
        )
    with torch.no_grad():
        net(torch.rand(2, 3, 32, 64))
    # The hooks here run after those of the attentions
    torch.testing.assert_close(seen[0], torch.stack(outputs, 1))
    assert list(attention_stages(net)) == ['layers.0-1', 'layers.2']


def test_another_size():
    net = build()
    net.eval()  # returns None in MMPretrain
    with torch.no_grad():
        assert net(torch.rand(1, 3, 64, 48))[0].shape == (1, 16)


def test_frozen_layers():
    net = build(frozen_stages=1)
    frozen = {n.split('.')[0] for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {'cls_token', 'pos_embed', 'patch_embed', 'layers'}
    assert all(p.requires_grad for p in net.layers[1].parameters())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="arch='base' is unknown; .* tiny, small"):
        build(arch='base')
    with pytest.raises(ValueError, match='patch_size=6 is not a multiple of 4'):
        build(patch_size=6)
