"""Made-up work directories of runs."""

import json

import numpy as np
import torch

from mmela.pruning import Divergence, PruningDecision, PruningReport, build_policy

POLICY = dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.2)
BLOCKS = dict(layer1=3, layer2=4, layer3=6, layer4=3)
CONFIG = (
    "custom_hooks = [dict(type='LayerAttentionPruningHook')]\n"
    "train_cfg = dict(max_epochs=4, type='EpochBasedTrainLoop')\n"
    "label = '<script>alert(1)</script>'\n"
)


def pruning(window, iteration, names, seed, policy=POLICY, spread=1.0):
    """A decision like the hook records it."""
    kl = np.exp(spread * np.random.default_rng(seed).normal(size=len(names)))
    stages = ['.'.join(name.split('.')[:2]) for name in names]
    values = []
    for i, stage in enumerate(stages):
        seen = i - stages.index(stage)
        parts = 0.25 * kl[i], 0.75 * kl[i]
        values.append(Divergence(*parts, seen, 1) if seen else None)
    built = build_policy(policy)
    return PruningDecision(
        built(values, stages, names),
        built.config,
        window=window,
        unit='epoch',
        iteration=iteration,
    )


def write_log(work_dir, stamp, epochs, metrics=True, seconds=0.5, loss=4.0):
    """Write the log of one start: every fifth of 20 iterations per epoch."""
    records = []
    for epoch in epochs:
        for i in range(5, 21, 5):
            step = 20 * (epoch - 1) + i
            records.append(
                dict(
                    loss=loss / epoch,
                    data_time=0.01,
                    time=seconds / epoch,
                    epoch=epoch,
                    iter=step,
                    step=step,
                )
            )
        if metrics:
            records.append(
                {
                    'coco/bbox_mAP': 0.1 * epoch if epoch < 4 else 0.25,
                    'coco/bbox_mAP_50': 0.2 * epoch,
                    'coco/bbox_mAP_l': -1.0,
                    'data_time': 0.1,
                    'time': 9.0,
                    'step': epoch,
                }
            )
        records.append({'layer_attention/active': 7, 'step': 20 * epoch})
    path = work_dir / stamp / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return path


def write_decisions(work_dir, decisions, policy=POLICY):
    hook = dict(
        windows=[decision.window for decision in decisions],
        by_epoch=True,
        policy=policy,
        keep_value=False,
        reduction='mean_kl',
        eps=1e-8,
    )
    PruningReport(hook, tuple(decisions)).write(work_dir / 'pruning.json')


def make_work_dir(work_dir, blocks=BLOCKS, policy=POLICY, spread=1.0):
    """A run of 4 epochs with pruning after epochs 1 and 3."""
    names = [
        f'backbone.{stage}.{i}.layer_attn'
        for stage, depth in blocks.items()
        for i in range(depth)
    ]
    first = pruning((1, 1), 20, names, 0, policy, spread)
    second = pruning((3, 3), 60, first.active, 1, policy, spread)
    write_log(work_dir, '20260102_030405', range(1, 5))
    write_decisions(work_dir, [first, second], policy)
    (work_dir / 'my_config.py').write_text(CONFIG)
    state = {'backbone.conv1.weight': torch.zeros(5, 7)}
    for name in names:
        state[f'{name}.conv.weight'] = torch.zeros(11)
        state[f'{name}.norm.running_mean'] = torch.zeros(3)
        state[f'{name}.state'] = torch.tensor(
            0 if name in second.active else 2, dtype=torch.uint8
        )
    torch.save(dict(meta={}, state_dict=state), work_dir / 'epoch_4.pth')
    torch.save({}, work_dir / 'best_coco_bbox_mAP_epoch_3.pth')
    # As if the folder has been moved
    (work_dir / 'last_checkpoint').write_text('elsewhere/work/epoch_4.pth')
    return [first, second]
