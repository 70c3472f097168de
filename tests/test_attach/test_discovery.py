import pytest
import torch
from torch import nn

from mmela.attach.discovery import (
    Trial,
    find_blocks,
    find_plain_blocks,
    group,
    name_matches,
    watch,
)
from tests.helpers.attachable import Conv, Nested, Patches, TwoBranches


def found(network, size=(16, 24)):
    return group(find_blocks(trial(network, size)))


def trial(network, size):
    return Trial(watch(network, torch.randn(2, 3, *size)), 2, size)


def names(stages):
    return [[block.name for block in stage] for stage in stages]


def test_nested_groups_and_a_split():
    stages = found(Nested())
    assert names(stages) == [
        ['groups.0.0', 'groups.0.1.0', 'groups.0.1.1', 'groups.1.0.0'],
        ['groups.1.1'],
        ['blocks.0', 'blocks.1'],
    ]
    first, second = stages[0][:2]
    assert (first.features.layout, first.channels, first.size) == ('BCHW', 8, (8, 12))
    # The input of the first has another shape; its downsample is known.
    assert not first.same_input and first.shortcut == 'down'
    assert second.same_input and second.shortcut is None


def test_each_branch_is_a_stage():
    assert names(found(TwoBranches())) == [
        [f'stages.{s}.branches.{b}.{i}' for i in (0, 1)] for s in (0, 1) for b in (0, 1)
    ]


@pytest.mark.parametrize('extra', [0, 1, 2])
@pytest.mark.parametrize('size', [(16, 24), (12, 32), (16, 16)])
def test_tokens(extra, size):
    (stage,) = found(Patches(8, extra), size)
    assert [block.name for block in stage] == ['layers.0', 'layers.1', 'layers.2']
    for block in stage:
        features = block.features
        assert (features.layout, block.channels) == ('BLC', 8)
        assert features.extra == extra
        assert block.size == (size[0] // 4, size[1] // 4)


@pytest.mark.parametrize('size', [(16, 24), (24, 16), (16, 16)])
def test_maps_with_the_channels_last(size):
    (stage,) = found(Patches(8, last=True), size)
    assert {(block.features.layout, block.channels) for block in stage} == {('BHWC', 8)}
    assert stage[0].size == (size[0] // 4, size[1] // 4)


def test_without_residual_connections():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
    )
    assert found(network) == []
    stages = group(find_plain_blocks(trial(network, (16, 24))))
    assert names(stages) == [['0', '2']]


def test_a_block_that_runs_twice_is_none():
    block = Conv(3, 3)
    assert found(nn.Sequential(block, Conv(3, 3), block)) != []
    assert names(found(nn.Sequential(block, Conv(3, 3), block))) == [['1']]


def test_watching_leaves_a_network_as_it_was():
    network = Patches(8, 1).train()
    network.layers[1].eval()
    modes = [module.training for module in network.modules()]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    watch(network, torch.randn(2, 3, 16, 16))
    assert [module.training for module in network.modules()] == modes
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    for tensor in network.parameters():
        assert not [name for name in vars(tensor) if 'mmela' in name]


@pytest.mark.parametrize(
    'pattern, name, matches',
    [
        ('layers.*', 'layers.3', True),
        ('layers.*', 'layers.3.mix', False),
        ('stages.*.blocks.*', 'stages.0.blocks.11', True),
        ('layers.3', 'layers.30', False),
        ('layers.?', 'layers.3', False),
        ('*', 'layers', True),
    ],
)
def test_patterns(pattern, name, matches):
    assert name_matches(pattern, name) is matches
