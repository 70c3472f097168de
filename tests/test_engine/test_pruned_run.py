"""What becomes of the rest of a run when attentions are pruned."""

import copy
from types import SimpleNamespace

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch.optim.swa_utils import AveragedModel

from mmela.engine import averaged_copies, followed, prune_run, trained_parameters
from mmela.layers import AttentionState
from mmela.structure import layer_attentions
from tests.helpers.runs import pruned, states
from tests.helpers.toy import ToyNetwork

NAME = 'layer1.1.layer_attn'


def make_run(**hook):
    model = ToyNetwork(dict(type='MRLABase', head_dim=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 8, 4, 4), torch.zeros(2), mode='loss')['loss'].backward()
    optimizer.step()
    return SimpleNamespace(
        model=model,
        hooks=[
            SimpleNamespace(),
            SimpleNamespace(**{k: v(model) for k, v in hook.items()}),
        ],
        optim_wrapper=OptimWrapper(optimizer),
    )


def test_every_copy_is_pruned():
    runner = make_run(
        ema=ExponentialMovingAverage,
        swa=AveragedModel,
        part=lambda model: AveragedModel(copy.deepcopy(model.layer1)),
    )
    assert len(averaged_copies(runner)) == 3
    prune_run(runner, [NAME], False, {})
    assert pruned(runner.model) == [NAME]
    for model in averaged_copies(runner)[:2]:
        assert states(model) == states(runner.model)
    # What has no such name is left alone.
    part = layer_attentions(averaged_copies(runner)[2])
    assert {a.attention_state for a in part.values()} == {AttentionState.ACTIVE}


def test_momenta_of_the_pruned_go():
    runner = make_run()
    optimizer = runner.optim_wrapper.optimizer
    gone = set(layer_attentions(runner.model)[NAME].parameters())
    assert gone <= set(optimizer.state)
    prune_run(runner, [NAME], False, {})
    assert set(optimizer.state) == set(trained_parameters(runner)) - gone
    assert gone <= set(trained_parameters(runner))  # they stay in their group


def test_several_optimizers():
    model = torch.nn.Linear(2, 3)
    wrapper = OptimWrapperDict(
        **{
            k: OptimWrapper(torch.optim.SGD([p], 0.1))
            for k, p in model.named_parameters()
        }
    )
    runner = SimpleNamespace(optim_wrapper=wrapper)
    assert set(trained_parameters(runner)) == set(model.parameters())


def test_followed_names():
    names = ['student.a.layer_attn', 'students.b.layer_attn']
    assert followed(names, dict(teacher='student')) == ['teacher.a.layer_attn']
    assert followed(names, {}) == []
