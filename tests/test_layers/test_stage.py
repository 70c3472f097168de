import torch
from torch import nn

from mmela.layers import AttentionState, LayerAttentionStage, MRLABase


def make_stage(n=3):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(n)]
    for block in blocks:
        block.layer_attn = MRLABase(8, head_dim=4)
    return LayerAttentionStage(*blocks)


def test_without_attention_it_is_a_sequential():
    stage = make_stage()
    for block in stage:
        del block.layer_attn
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(stage(x), nn.Sequential(*stage)(x))
    assert stage.attentions == []


def test_pruned_equals_removed():
    stage, x = make_stage(), torch.randn(2, 8, 5, 5)
    stage[1].layer_attn.attention_state = AttentionState.PRUNED
    pruned = stage(x)
    del stage[1].layer_attn
    assert torch.equal(stage(x), pruned)


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
