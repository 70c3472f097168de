import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from mmela.layers import KCLA, MLA, AttentionState, MRLABase, MRLALight
from mmela.layers.base import eca_kernel_size


# |log2(C) + 1| / 2 by hand: 64 -> 3.5, 256 -> 4.5, 512 -> 5, 1024 -> 5.5,
# 2048 -> 6; cut to an integer, then the next odd number.
@pytest.mark.parametrize(
    'channels, size', [(64, 3), (256, 5), (512, 5), (1024, 5), (2048, 7)]
)
def test_eca_kernel_size(channels, size):
    assert eca_kernel_size(channels) == size


def test_head_dim_must_divide_channels():
    with pytest.raises(ValueError, match='head_dim=24 .* 64 channels'):
        MRLABase(64, head_dim=24)
    with pytest.raises(ValueError, match='head_dim=0'):
        MRLABase(64, head_dim=0)


def trainable(attention):
    return {n for n, p in attention.named_parameters() if p.requires_grad}


def test_state_decides_what_is_trained():
    attention = MRLABase(16, head_dim=8)
    everything = trainable(attention)
    attention.attention_state = AttentionState.VALUE_ONLY
    assert trainable(attention) == {'key.weight', 'value.weight'}
    attention.attention_state = AttentionState.PRUNED
    assert trainable(attention) == set()
    assert not attention.active
    attention.attention_state = AttentionState.ACTIVE
    assert trainable(attention) == everything


def test_frozen_parameters_stay_frozen_after_reactivation():
    attention = MRLABase(16, head_dim=8)
    attention.requires_grad_(False)
    attention.attention_state = AttentionState.PRUNED
    attention.attention_state = AttentionState.ACTIVE
    assert trainable(attention) == set()


@pytest.mark.parametrize('state', list(AttentionState))
def test_state_travels_in_state_dict(state):
    attention = MRLABase(16, head_dim=8)
    attention.attention_state = state
    other = MRLABase(16, head_dim=8)
    other.load_state_dict(attention.state_dict())
    assert other.attention_state is state
    assert trainable(other) == trainable(attention)


@pytest.mark.parametrize(
    'saved, network, message',
    [
        (MRLABase(16, head_dim=8), MLA(16, head_dim=8), r"'MRLABase\(.*'MLA\("),
        (MRLABase(16, head_dim=8), MRLABase(16, head_dim=4), 'head_dim=8.*head_dim=4'),
        (
            MRLALight(16, head_dim=8),
            MRLALight(16, head_dim=8, previous='output'),
            'previous=identity.*previous=output',
        ),
        (KCLA(16, head_dim=8), KCLA(16, head_dim=8, temperature=1), 'temperature=0.7'),
    ],
)
def test_checkpoint_of_another_attention_is_refused(saved, network, message):
    """Although all keys and shapes are the same."""
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match=message):
        network.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match=message):  # strict does not matter
        network.load_state_dict(saved.state_dict(), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_averaged_copy_follows_the_buffer():
    """torch averages buffers in place, of which no Python code is told."""
    model = MRLABase(16, head_dim=8)
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    model.attention_state = AttentionState.PRUNED
    for _ in range(3):
        averaged.update_parameters(model)
    averaged.eval()
    assert float(averaged.module.state) == 1.5  # what one has pruned is pruned
    assert averaged.module.attention_state is AttentionState.PRUNED
    averaged.module.state.fill_(-1.25)
    assert averaged.module.attention_state is AttentionState.VALUE_ONLY
    averaged.module.state.fill_(0)
    assert averaged.module.active


def test_state_in_inference_mode():
    with torch.inference_mode():
        attention = MRLABase(16, head_dim=8).eval()
        assert attention.active
