import pytest

from mmela.layers import AttentionState, MRLABase
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
