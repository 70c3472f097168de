import copy
import gc
import os
import shutil

import pytest
import torch
from torch import nn

from mmela.layers import KCLA, AttentionState, MRLABase, MRLALight
from mmela.layers.stage import PassHook, _running
from tests.helpers.stages import BlockStage


def make_stage(attention=MRLABase, indices=(0, 1, 2)):
    torch.manual_seed(0)
    stage = BlockStage(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
    attentions = [attention(8, head_dim=4) for _ in range(3)]
    for index in indices:
        stage.attach(index, attentions[index])
    return stage


def test_pruned_equals_removed():
    stage, x = make_stage(), torch.randn(2, 8, 5, 5)
    stage[1].layer_attn.attention_state = AttentionState.PRUNED
    assert torch.equal(make_stage(indices=(0, 2))(x), stage(x))
    for attention in stage.attentions:
        attention.attention_state = AttentionState.PRUNED
    plain = make_stage(indices=())
    assert not plain.attentions and torch.equal(stage(x), plain(x))


def test_observer_sees_scores_of_active_attentions():
    stage, x = make_stage(), torch.randn(2, 8, 5, 5)
    seen = []
    stage.observer = seen.append
    stage(x)
    stage[1].layer_attn.attention_state = AttentionState.PRUNED
    stage(x)
    stage.observer = None
    stage(x)
    assert [[s.shape for s in scores] for scores in seen] == [
        [(2, 2, 1), (2, 2, 2), (2, 2, 3)],
        [(2, 2, 1), (2, 2, 2)],
    ]
    assert not any(s.requires_grad for scores in seen for s in scores)


def test_blocks_without_an_attention_keep_their_place():
    stage, x = make_stage(indices=(0, 2)), torch.randn(2, 8, 5, 5)
    assert [attention.place.index for attention in stage.attentions] == [0, 1]
    assert [attention.place.block for attention in stage.attentions] == ['0', '2']
    memory, expected = MRLABase.Memory(), x
    for block in stage:
        expected = block.forward(expected)  # without its hooks
        if hasattr(block, 'layer_attn'):
            attention = block.layer_attn
            expected = expected + attention(expected, memory)
    torch.testing.assert_close(stage(x), expected)


def test_reached_is_what_a_pass_came_to():
    stage, x = make_stage(), torch.randn(2, 8, 5, 5)
    stage[0](x)
    assert [a.reached for a in stage.attentions] == [True, False, False]
    stage(x)
    assert all(a.reached for a in stage.attentions)


def test_a_copy_is_not_measured_and_shares_within_itself():
    stage, seen = make_stage(), []
    stage.observer = seen.append
    other = copy.deepcopy(stage)
    other(torch.randn(2, 8, 5, 5))
    assert not seen and other.observer is None
    assert {a.place.stage for a in other.attentions} == {other.place}
    assert other.place is not stage.place


def test_hooks_of_others_see_the_output_with_the_attention():
    """Also those that were there before it."""
    torch.manual_seed(0)
    stage, seen = BlockStage(nn.Conv2d(8, 8, 3, padding=1)), []
    stage[0].register_forward_hook(lambda m, args, out: seen.append(out))
    stage.attach(0, MRLABase(8, head_dim=4))
    assert stage(torch.randn(2, 8, 5, 5)) is seen[0]


def test_blocks_run_in_order_from_the_first_on():
    stage, x = make_stage(), torch.randn(2, 8, 5, 5)
    with pytest.raises(
        RuntimeError, match=r'block 1 runs, but not all .* \(0, 1, 2\) have run'
    ):
        stage[1](x)
    stage[0](x)
    with pytest.raises(RuntimeError, match='block 2 runs, but not all .* have run'):
        stage[2](x)
    # and what failed is forgotten
    with pytest.raises(RuntimeError, match='block 1 runs, but not all .* have run'):
        stage[1](x)
    expected = make_stage()(x)
    stage[0](x)  # a pass that goes no further leaves nothing for the next one
    assert torch.equal(stage(x), expected)


def test_a_block_within_itself():
    stage = make_stage()
    block = stage[0]

    def again(module, args):
        handle.remove()
        block(args[0])

    handle = block.register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match='block 0 calls itself'):
        stage(torch.randn(2, 8, 5, 5))


def test_a_changed_output_is_named():
    stage = make_stage()
    forward = stage[1].forward
    stage[1].forward = lambda x: (forward(x),)
    message = r'block 1 returned a tuple with tensors of shapes \(2, 8, 5, 5\)'
    with pytest.raises(RuntimeError, match=message):
        stage(torch.randn(2, 8, 5, 5))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.downsample = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) + self.downsample(x)


@pytest.mark.parametrize('attention', [MRLABase, MRLALight, KCLA])
@pytest.mark.parametrize('where', ['attention', 'block', 'pre-hook', 'observer'])
def test_an_exception_leaves_nothing_behind(attention, where):
    torch.manual_seed(0)
    stage = BlockStage(*[Block() for _ in range(3)])
    for i in range(3):
        stage.attach(i, attention(8, head_dim=4))

    def fail(*args):
        raise KeyError('on purpose')

    stage.register_forward_pre_hook(PassHook([stage.place]), with_kwargs=True)
    x = torch.randn(2, 8, 5, 5)
    expected = stage(x)
    if where == 'attention':
        handle = stage[1].layer_attn.register_forward_hook(fail)
    elif where == 'block':
        handle = stage[1].conv.register_forward_hook(fail)
    elif where == 'pre-hook':
        handle = stage[1].register_forward_pre_hook(fail)
    else:
        stage.observer = fail
    with pytest.raises(KeyError, match='on purpose') as caught:
        stage(x)
    del caught
    gc.collect()
    assert stage.place not in _running.runs
    copy.deepcopy(stage)  # fails where a tensor with a graph hangs on a module
    stage.observer = None
    if where != 'observer':
        handle.remove()
    assert torch.equal(stage(x), expected)


@pytest.mark.skipif(
    not hasattr(torch, 'compiler'), reason='torch 2.0 compiles no stage as a whole'
)
@pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')),
    reason='inductor needs a C++ compiler: g++, or what CXX names',
)
def test_stage_compiled_by_inductor():
    """Outputs and gradients are those of the eager stage."""
    stage = make_stage().double()
    stage[1].layer_attn.attention_state = AttentionState.VALUE_ONLY
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(stage), backend='inductor', fullgraph=True)
    x = torch.randn(2, 8, 6, 4, dtype=torch.double)
    results = []
    for run in (stage, compiled):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        (out**2).mean().backward()
        grads = {n.replace('_orig_mod.', ''): p.grad for n, p in run.named_parameters()}
        results.append(dict(grads, out=out, x=leaf.grad))
    assert results[0]['2.layer_attn.query.weight'].abs().sum() > 0
    torch.testing.assert_close(*results)
