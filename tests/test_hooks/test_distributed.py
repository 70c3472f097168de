"""Real runs of two processes over gloo."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tests.helpers.fresh import hurry
from tests.helpers.runs import HOOK, POLICY, decisions, divergences, states
from tests.helpers.toy import toy_config, train

LONG = dict(windows=[(1, 3)], policy=POLICY)


def whole(work_dir, **kwargs):
    return toy_config(work_dir, HOOK, norm_eval=True, **kwargs)


def in_window(work_dir, **kwargs):
    return toy_config(work_dir, LONG, norm_eval=True, **kwargs)


def uneven(work_dir, **kwargs):
    """Rank 0 has 6 samples and rank 1 has 5."""
    cfg = toy_config(
        work_dir,
        dict(windows=[(1, 1)], policy=POLICY),
        epochs=2,
        lr=0.0,
        size=11,
        norm_eval=True,
        **kwargs,
    )
    cfg.train_dataloader.sampler.round_up = False
    return cfg


def fine_tuned(work_dir, run='whole', **kwargs):
    """A pruned checkpoint is trained on, without the hook."""
    checkpoint = str(Path(work_dir).parent / run / 'epoch_4.pth')
    return toy_config(
        work_dir, epochs=1, norm_eval=True, **{'load_from': checkpoint, **kwargs}
    )


def fine_tuned_values(work_dir, **kwargs):
    """Pruned attentions whose key and value are used, as a slim network has."""
    return fine_tuned(work_dir, 'keep_value', **kwargs)


def initialized(work_dir, **kwargs):
    """The pruned checkpoint is that of an init_cfg, as with a backbone's."""
    cfg = fine_tuned(work_dir, **kwargs)
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=cfg.pop('load_from'))
    return cfg


def resumed_without_hook(work_dir, **kwargs):
    cfg = fine_tuned(work_dir, resume=True, **kwargs)
    cfg.train_cfg.max_epochs = 5
    return cfg


def flexible_without_hook(work_dir, model_wrapper_cfg, **kwargs):
    return fine_tuned(
        work_dir,
        strategy=dict(type='DDPStrategy', model_wrapper=model_wrapper_cfg),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        **kwargs,
    )


def keep_value(work_dir, **kwargs):
    return toy_config(work_dir, dict(HOOK, keep_value=True), norm_eval=True, **kwargs)


def iterations(work_dir, **kwargs):
    return toy_config(
        work_dir,
        dict(windows=[(1, 5)], policy=POLICY, by_epoch=False),
        norm_eval=True,
        train_cfg=dict(by_epoch=False, max_iters=7),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)
        ),
        **kwargs,
    )


def flexible(work_dir, model_wrapper_cfg, **kwargs):
    """FlexibleRunner, whose strategy wraps the model."""
    return whole(
        work_dir,
        strategy=dict(type='DDPStrategy', model_wrapper=model_wrapper_cfg),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        **kwargs,
    )


@HOOKS.register_module()
class CommunicationHook(Hook):
    """Registers a communication hook that counts its calls in each epoch."""

    def before_train(self, runner):
        self.calls = [0] * runner.max_epochs
        runner.model.register_comm_hook(self, CommunicationHook.reduce)

    def before_train_epoch(self, runner):
        self.epoch = runner.epoch

    def reduce(self, bucket):
        self.calls[self.epoch] += 1
        return allreduce_hook(None, bucket)


def communication_hook(work_dir, **kwargs):
    cfg = whole(work_dir, **kwargs)
    cfg.custom_hooks.append(dict(type='CommunicationHook'))
    return cfg


def resume(make, checkpoint):

    def made(work_dir, **kwargs):
        return make(work_dir, load_from=checkpoint, resume=True, **kwargs)

    return made


def runs(root):
    """Runs of two processes, in this order; some resume an earlier one."""
    return dict(
        whole=whole,
        uneven=uneven,
        keep_value=keep_value,
        iterations=iterations,
        flexible=flexible,
        communication_hook=communication_hook,
        fine_tuned=fine_tuned,
        fine_tuned_values=fine_tuned_values,
        initialized=initialized,
        resumed_without_hook=resumed_without_hook,
        flexible_without_hook=flexible_without_hook,
        in_window=in_window,
        whole_resumed=resume(whole, f'{root}/whole/epoch_2.pth'),
        in_window_resumed=resume(in_window, f'{root}/in_window/epoch_2.pth'),
        one_to_two=resume(in_window, f'{root}/single_in_window/epoch_2.pth'),
        iterations_resumed=resume(iterations, f'{root}/iterations/iter_4.pth'),
    )


def work(rank, root, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    hurry()
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    for name, make in runs(root).items():
        runner = train(
            make(
                f'{root}/{name}',
                batch_size=2,
                launcher='pytorch',
                model_wrapper_cfg=dict(
                    type='MMDistributedDataParallel',
                    device_ids=None,
                    find_unused_parameters=False,
                ),
            )
        )
        torch.save(
            dict(
                state={key: int(s) for key, s in states(runner.model).items()},
                calls=[
                    h.calls for h in runner.hooks if isinstance(h, CommunicationHook)
                ],
                weights=runner.model.module.state_dict(),
                moments=len(runner.optim_wrapper.optimizer.state),
                trained=sum(p.requires_grad for p in runner.model.parameters()),
            ),
            f'{root}/{name}/rank{rank}.pt',
        )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('two')
    train(in_window(root / 'single_in_window'))
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        work, (str(root), port), nprocs=2, start_method='forkserver'
    )
    return root


def ranks(root, name):
    return [torch.load(root / name / f'rank{rank}.pt') for rank in range(2)]


@pytest.mark.parametrize('name', list(runs('')))
def test_ranks_agree(root, name):
    """All ranks hold the same masks and weights and go on training."""
    first, second = ranks(root, name)
    assert first['state'] == second['state']
    assert any(first['state'].values())
    for key, value in first['weights'].items():
        if 'running' not in key and 'num_batches' not in key:
            assert torch.equal(value, second['weights'][key]), key
    if name != 'uneven':
        assert first['moments'] == first['trained']


@pytest.mark.parametrize('name', ['whole', 'keep_value', 'iterations'])
def test_same_as_one_process(root, tmp_path, name):
    """Two ranks with half the batch each train the same network."""
    runner = train(runs('')[name](tmp_path))
    found, _ = ranks(root, name)
    pairs = list(zip(decisions(root / name), decisions(tmp_path)))
    assert len(pairs) == len(decisions(tmp_path))
    for two, one in pairs:
        assert two.pruned == one.pruned
        assert divergences(two) == pytest.approx(divergences(one), rel=1e-4)
    for key, value in runner.model.state_dict().items():
        torch.testing.assert_close(found['weights'][key], value, rtol=1e-4, atol=1e-6)


def test_uneven_ranks_do_not_bias_the_mean(root, tmp_path):
    """All samples count the same: as one process that sees all at once."""
    train(uneven(tmp_path, batch_size=11))
    (two,), (one,) = decisions(root / 'uneven'), decisions(tmp_path)
    assert divergences(two) == pytest.approx(divergences(one), rel=1e-5)


@pytest.mark.parametrize(
    'resumed, original',
    [
        ('whole_resumed', 'whole'),
        ('flexible', 'whole'),
        ('communication_hook', 'whole'),
        ('in_window_resumed', 'in_window'),
        ('one_to_two', 'in_window'),
        ('iterations_resumed', 'iterations'),
    ],
)
def test_resume_ends_as_uninterrupted(root, resumed, original):
    for two, one in zip(decisions(root / resumed), decisions(root / original)):
        assert two.pruned == one.pruned
    found, expected = ranks(root, resumed)[0], ranks(root, original)[0]
    assert found['state'] == expected['state']
    for key, value in expected['weights'].items():
        torch.testing.assert_close(found['weights'][key], value, rtol=1e-4, atol=1e-6)


def test_communication_hooks_survive(root):
    """One reduction or more in each of the 3 iterations of all epochs."""
    for rank in ranks(root, 'communication_hook'):
        (calls,) = rank['calls']
        assert min(calls) >= 3


@pytest.mark.parametrize(
    'name, run',
    [
        ('fine_tuned', 'whole'),
        ('fine_tuned_values', 'keep_value'),
        ('initialized', 'whole'),
        ('resumed_without_hook', 'whole'),
        ('flexible_without_hook', 'whole'),
    ],
)
def test_training_on_without_the_hook(root, tmp_path, name, run):
    """As one process does, which waits for nobody; what is pruned stays so."""
    made = runs('')[name](
        tmp_path,
        load_from=f'{root}/{run}/epoch_4.pth',
        model_wrapper_cfg=None,
    )
    if name == 'flexible_without_hook':
        made.strategy = dict(type='SingleDeviceStrategy')
    runner = train(made)
    found, before = ranks(root, name)[0], ranks(root, run)[0]
    assert found['state'] == before['state']
    for key, value in runner.model.state_dict().items():
        torch.testing.assert_close(found['weights'][key], value, rtol=1e-4, atol=1e-6)
    trained = {n: p.requires_grad for n, p in runner.model.named_parameters()}
    assert not all(trained.values())
    for key, takes_part in trained.items():
        same = torch.equal(found['weights'][key], before['weights'][key])
        assert same == (not takes_part), key
    assert not (root / name / 'pruning.json').exists()


def test_two_to_one(root, tmp_path):
    """A checkpoint of two ranks resumes on one."""
    runner = train(resume(in_window, f'{root}/in_window/epoch_2.pth')(tmp_path))
    expected = ranks(root, 'in_window')[0]
    for key, value in runner.model.state_dict().items():
        torch.testing.assert_close(
            expected['weights'][key], value, rtol=1e-4, atol=1e-6
        )
