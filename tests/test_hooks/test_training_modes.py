"""Pruning with what users of mmengine switch on."""

import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS
from mmengine.runner import FlexibleRunner
from torch import nn

from mmela.hooks import NetworkKLMeter
from mmela.layers import AttentionState
from mmela.pruning import build_policy
from mmela.structure import attention_stages, prune
from tests.helpers.runs import HOOK, POLICY, decisions, divergences, pruned, states
from tests.helpers.toy import ToyNetwork, toy_config, train


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return train(toy_config(tmp_path_factory.mktemp('plain'), HOOK))


def assert_same_run(runner, plain):
    assert AttentionState.PRUNED in states(runner.model).values()
    assert states(runner.model) == states(plain.model)
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(
            runner.model.state_dict()[key], value, rtol=1e-4, atol=1e-6
        )


SGD = dict(lr=0.001, momentum=0.9, weight_decay=0.01)


def optimizer(**kwargs):
    return dict(optimizer=dict(type='SGD', **SGD), **kwargs)


def test_gradient_accumulation(tmp_path):
    """Two batches of 2 make one of 4, but for the BN statistics."""
    one = train(toy_config(tmp_path / 'one', HOOK, norm_eval=True))
    two = train(
        toy_config(
            tmp_path / 'two',
            HOOK,
            norm_eval=True,
            batch_size=2,
            optim_wrapper=optimizer(accumulative_counts=2),
        )
    )
    assert_same_run(two, one)


def test_pruning_amid_an_accumulation(tmp_path):
    """Half-accumulated gradients of pruned parameters are forgotten."""
    runner = train(
        toy_config(tmp_path, HOOK, optim_wrapper=optimizer(accumulative_counts=2))
    )
    for name, param in runner.model.named_parameters():
        if not param.requires_grad:
            assert param.grad is None, name


@MODELS.register_module()
class FollowsTheInput(ToyNetwork):
    """Its first stage has an input with gradient, as after a stem.

    Reentrant checkpointing would not train it otherwise.
    """

    def forward(self, inputs, target, **kwargs):
        return super().forward(inputs.requires_grad_(), target, **kwargs)


def test_activation_checkpointing(tmp_path, plain):
    """A stage that runs twice per step is measured right."""
    cfg = toy_config(tmp_path, HOOK, activation_checkpointing=['layer1', 'layer2'])
    cfg.model.type = 'FollowsTheInput'
    runner = train(cfg)
    assert states(runner.model) == states(plain.model)
    pairs = zip(decisions(tmp_path), decisions(plain.work_dir))
    for found, expected in pairs:
        assert divergences(found) == pytest.approx(divergences(expected), rel=1e-4)


@HOOKS.register_module()
class KeepsTheStart(Hook):
    """Keeps a copy of the model as training starts."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        type(self).model = copy.deepcopy(runner.model)


def by_hand(loader, max_norm=None):
    """The same training without runner and hook; returns model and divergences."""
    model = KeepsTheStart.model.train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    measured = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        meter = NetworkKLMeter(attention_stages(model))
        meter.attach()
        for batch in loader:
            optimizer.zero_grad()
            model(**batch, mode='loss')['loss'].backward()
            if max_norm is not None:
                used = [p for p in model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(used, max_norm)
            optimizer.step()
        meter.detach()
        if epoch in (0, 2):
            decision = meter.decide(build_policy(POLICY))
            measured.append(divergences(decision))
            prune(model, decision.pruned)
            for param in model.parameters():
                if not param.requires_grad:
                    optimizer.state.pop(param, None)
    return model, measured


def assert_as_by_hand(runner, **kwargs):
    model, measured = by_hand(runner.train_dataloader, **kwargs)
    assert pruned(runner.model) == pruned(model) != []
    for decision, expected in zip(decisions(runner.work_dir), measured):
        assert divergences(decision) == pytest.approx(expected, rel=1e-6)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(runner.model.state_dict()[key], value)


def kept_start(work_dir, **kwargs):
    cfg = toy_config(work_dir, HOOK, **kwargs)
    cfg.custom_hooks.append(dict(type='KeepsTheStart'))
    return train(cfg)


def test_clip_grad(tmp_path, plain):
    norm = 0.01
    runner = kept_start(
        tmp_path, optim_wrapper=optimizer(clip_grad=dict(max_norm=norm))
    )
    assert_as_by_hand(runner, max_norm=norm)
    # It made a difference.
    found, other = (decisions(r.work_dir)[1] for r in (runner, plain))
    assert divergences(found) != pytest.approx(divergences(other), rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(tmp_path, plain, dtype):
    """What AmpOptimWrapper does on a GPU, which mmengine wants for it."""
    with torch.autocast('cpu', dtype=dtype):
        runner = kept_start(tmp_path)
        assert_as_by_hand(runner)
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())
    # Close to single precision, and not the same
    found, expected = (divergences(decisions(r.work_dir)[0]) for r in (runner, plain))
    assert found == pytest.approx(expected, rel=0.02)
    assert found != pytest.approx(expected, rel=1e-7)


def test_auto_scale_lr(tmp_path):
    runner = train(
        toy_config(tmp_path, HOOK, auto_scale_lr=dict(enable=True, base_batch_size=8))
    )
    assert runner.optim_wrapper.get_lr()['lr'] == [0.0005]
    assert AttentionState.PRUNED in states(runner.model).values()


def test_frozen_stage(tmp_path):
    """A frozen stage is measured and pruned too, and stays frozen."""
    cfg = toy_config(tmp_path, HOOK)
    cfg.model.frozen_stages = 1
    runner = train(cfg)
    assert any(
        name.startswith('layer1') and state == AttentionState.PRUNED
        for name, state in states(runner.model).items()
    )
    assert not any(p.requires_grad for p in runner.model.layer1.parameters())


def test_sync_bn():
    """torch runs it on GPUs only; the conversion keeps the structure."""
    from tests.helpers.toy import ToyNetwork

    model = ToyNetwork(dict(type='MRLABase', head_dim=4))
    model.layer1[1].layer_attn.attention_state = AttentionState.PRUNED
    model.eval()
    x, target = torch.randn(2, 8, 6, 6), torch.zeros(2)
    expected = model(x, target)
    before = states(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert isinstance(model.layer1[0].layer_attn.norm, nn.SyncBatchNorm)
    assert states(model) == before
    torch.testing.assert_close(model(x, target), expected)


def test_compile_keeps_one_graph_and_recompiles_once_per_pruning():
    from tests.helpers.toy import ToyNetwork

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = ToyNetwork(dict(type='MRLABase', head_dim=4), depth=3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, target = torch.randn(2, 8, 6, 6), torch.zeros(2)
    counts = []
    for gone in (None, model.layer1[2], model.layer2[1]):
        if gone is not None:
            gone.layer_attn.attention_state = AttentionState.PRUNED
        for _ in range(3):
            compiled(x, target, mode='loss')['loss'].backward()
        torch.testing.assert_close(
            compiled(x, target), model(x, target), rtol=1e-4, atol=1e-5
        )
        counts.append(len(graphs))
    # One graph for mode='loss' and one for mode='tensor' each time
    assert counts == [2, 4, 6]


def test_compiled_run(tmp_path):
    torch._dynamo.reset()
    runners = []
    eager = dict(compile=dict(backend='eager'))
    for name, kwargs in dict(plain={}, compiled=eager).items():
        cfg = toy_config(tmp_path / name, HOOK, **kwargs)
        cfg.model.depth = 3
        runners.append(train(cfg))
    assert_same_run(*runners)


def test_flexible_runner(tmp_path, plain):
    runner = train(
        toy_config(
            tmp_path, HOOK, strategy=dict(type='SingleDeviceStrategy'), env_cfg={}
        )
    )
    assert isinstance(runner, FlexibleRunner)
    assert_same_run(runner, plain)


def test_other_wrappers_are_refused(tmp_path):

    @MODEL_WRAPPERS.register_module(force=True)
    class ShardedWrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def train_step(self, *args, **kwargs):
            raise AssertionError('the run must end before the first step')

    from mmengine.runner import Runner

    runner = Runner.from_cfg(toy_config(tmp_path, HOOK))
    runner.model = ShardedWrapper(runner.model)
    with pytest.raises(ValueError, match='ShardedWrapper.*MMDistributed'):
        runner.train()
