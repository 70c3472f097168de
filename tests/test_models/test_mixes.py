"""Attentions that run in different ways within one network.

Eager, compiled, checkpointed, with another backend or double differentiated:
the gradients are those of plain autograd.
"""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmela.layers import MLA, MRLABase
from tests.helpers.backbones import build
from tests.helpers.stages import BlockStage
from tests.helpers.zoo import ATTENTIONS

C, D = 8, 4
WAYS = ('eager', 'reference', 'autograd', 'compiled', 'disabled', 'checkpointed')


def make_stage(attention=MRLABase, n=5, **kwargs):
    torch.manual_seed(0)
    blocks = [torch.nn.Conv2d(C, C, 3, padding=1) for _ in range(n)]
    stage = BlockStage(*blocks)
    for i in range(n):
        stage.attach(i, attention(C, head_dim=D, backend='reference', **kwargs))
        torch.nn.init.normal_(stage[i].layer_attn.query.weight, std=3)
    return stage.double()


def gradients(run, stage, x):
    stage.zero_grad()
    x = x.clone().requires_grad_()
    (run(x) ** 2).mean().backward()
    return [x.grad, *(p.grad.clone() for p in stage.parameters())]


def apply(way, block):
    """Have the attention of a block, or the block, run in some way."""
    attention = block.layer_attn
    if way in ('reference', 'autograd'):
        attention.backend = way
    elif way == 'compiled':
        attention.forward = torch.compile(attention.forward, backend='aot_eager')
    elif way == 'disabled':
        attention.backend = 'auto'
        attention.forward = torch.compiler.disable(attention.forward)
    elif way == 'checkpointed':
        forward = block.forward
        block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    else:
        attention.backend = 'auto'


@pytest.mark.parametrize('seed', range(8))
def test_random_mixes(seed):
    rng = random.Random(seed)
    kind = rng.choice((MRLABase, MRLABase, MLA))
    stage = make_stage(kind)
    x = torch.randn(2, C, 6, 5, dtype=torch.double)
    expected = gradients(stage, stage, x)
    ways = [rng.choice(WAYS) for _ in stage]
    for way, block in zip(ways, stage):
        apply(way, block)
    run = stage
    if rng.random() < 0.5:
        torch._dynamo.reset()
        run = torch.compile(stage, backend=rng.choice(('eager', 'aot_eager')))
    for _ in range(2):
        for grad, e in zip(gradients(run, stage, x), expected):
            torch.testing.assert_close(grad, e, msg=lambda m: f'{ways}: {m}')


@pytest.mark.parametrize('attention', [MRLABase, MLA])
def test_reference_is_differentiable_twice(attention):
    """As a whole, not its sum alone."""
    stage = make_stage(attention, n=2, norm_cfg=None)
    x = torch.randn(1, C, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(stage, (x,))
    assert torch.autograd.gradgradcheck(stage, (x,))


@pytest.mark.parametrize('backend', ['auto', 'autograd', 'reference'])
def test_under_torch_func(backend):
    stage = make_stage(n=3, norm_cfg=None)
    for block in stage:
        block.layer_attn.backend = backend
    x = torch.randn(2, C, 3, 2, dtype=torch.double)
    params = dict(stage.named_parameters())

    def loss(params, x):
        return (torch.func.functional_call(stage, params, (x,)) ** 2).mean()

    grads = torch.func.grad(loss)(params, x)
    loss(params, x).backward()
    for name, param in stage.named_parameters():
        torch.testing.assert_close(grads[name], param.grad)


def test_reported_mixes():
    """One attention apart from a compiled network; one compiled alone."""
    for alone in ('disabled', 'compiled'):
        stage = make_stage()
        for block in stage:
            block.layer_attn.backend = 'auto'
        x = torch.randn(2, C, 6, 5, dtype=torch.double)
        expected = gradients(stage, stage, x)
        run = stage
        apply(alone, stage[1])
        if alone == 'disabled':
            torch._dynamo.reset()
            run = torch.compile(stage, backend='eager')
        for grad, e in zip(gradients(run, stage, x), expected):
            torch.testing.assert_close(grad, e)


@pytest.mark.parametrize(
    'backbone, attention',
    [
        ('ResNet', 'MRLABase'),
        ('ResNet', 'MRLALight'),
        ('ResNet', 'KCLA'),
        ('EfficientNet', 'MRLABase'),
    ],
)
def test_one_graph(backbone, attention):
    """What belongs to a pass does not break the graph of the compiler."""
    model = build('mmpretrain', backbone, ATTENTIONS[attention])
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        for out, expected in zip(compiled(x), model(x)):
            torch.testing.assert_close(out, expected)
