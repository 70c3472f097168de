"""Which networks of a model are measured and pruned."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, RUNNERS

from mmela.layers import AttentionState
from mmela.structure import layer_attentions, prune, trained_stages
from tests.helpers.runs import HOOK, decisions, log_of, pruned, states
from tests.helpers.toy import ToyNetwork, toy_config, train


@MODELS.register_module()
class Distillation(BaseModel):
    """A student learns from the targets and from a frozen teacher."""

    def __init__(self, teacher='MRLABase', teacher_depth=4, pruned=(), **student):
        super().__init__()
        attention = dict(type='MRLABase', head_dim=4)
        self.teacher = ToyNetwork(
            dict(type=teacher, head_dim=4), teacher_depth
        ).requires_grad_(False)
        self.student = ToyNetwork(attention, **student)
        prune(self.teacher, pruned)

    def forward(self, inputs, target, mode='tensor'):
        with torch.no_grad():
            goal = self.teacher(inputs, target)
        out = self.student(inputs, target)
        return dict(loss=F.mse_loss(out, target) + F.mse_loss(out, goal))


def distillation(work_dir, hook=HOOK, **model):
    cfg = toy_config(work_dir, hook, log_level='INFO')
    cfg.model = dict(type='Distillation', **model)
    return cfg


@pytest.mark.parametrize('teacher', ['MRLABase', 'MRLALight'])
def test_frozen_teacher_is_left_alone(tmp_path, teacher):
    runner = train(distillation(tmp_path, teacher=teacher))
    assert pruned(runner.model.student) and not pruned(runner.model.teacher)
    for decision in decisions(tmp_path):
        assert all(layer.stage.startswith('student.') for layer in decision.layers)
    assert len(decisions(tmp_path)[0].layers) == 8
    assert log_of(runner).count('teacher is not trained') == 1


@pytest.mark.parametrize('depth', [2, 3])
def test_says_where_no_stage_has_two_to_compare(tmp_path, depth):
    cfg = toy_config(tmp_path, HOOK, log_level='INFO')
    cfg.model['depth'] = depth
    said = log_of(train(cfg)).count('No stage has more than two active layer att')
    assert said == (depth == 2)


@pytest.mark.parametrize('keep_value', [False, True])
def test_follower_gets_the_structure(tmp_path, keep_value):
    hook = dict(HOOK, followers=dict(teacher='student'), keep_value=keep_value)
    runner = train(distillation(tmp_path, hook))
    assert pruned(runner.model.student)
    assert states(runner.model.teacher) == states(runner.model.student)
    for decision in decisions(tmp_path):
        assert all(layer.stage.startswith('student.') for layer in decision.layers)
    assert 'is not trained' not in log_of(runner)


@pytest.mark.parametrize(
    'followers, model, match',
    [
        (dict(tutor='student'), {}, "no module 'tutor'; it has .*teacher, student"),
        (dict(teacher='pupil'), {}, "no module 'pupil'"),
        (
            dict(teacher='student'),
            dict(teacher_depth=5),
            'layer1.4.layer_attn.*missing',
        ),
        (dict(teacher='student'), dict(teacher='MRLALight'), 'MRLALight.*MRLABase'),
        (
            dict(teacher='student'),
            dict(pruned=['layer2.1.layer_attn']),
            'layer2.1.layer_attn is .*PRUNED.*ACTIVE',
        ),
        (dict(student='teacher'), {}, 'student.layer1 is trained but follows another'),
        (
            dict(teacher='student.head'),
            {},
            'because no layer attention is measured in student.head',
        ),
    ],
)
def test_what_cannot_follow_is_refused_before_training(
    tmp_path, followers, model, match
):
    with pytest.raises(ValueError, match=match):
        train(distillation(tmp_path, dict(HOOK, followers=followers), **model))
    assert not list(tmp_path.glob('*.pth'))


def test_frozen_stage_of_a_trained_network_counts():
    model = Distillation()
    model.student.layer1.requires_grad_(False)
    found = trained_stages(model, model.parameters())
    assert list(found) == ['student.layer1', 'student.layer2']
    # What the optimizer does not hold is not trained either.
    assert not trained_stages(model, model.teacher.parameters())
    model.teacher.requires_grad_(True)
    assert not trained_stages(model, [])
    assert len(trained_stages(model, model.parameters())) == 4
    assert list(trained_stages(torch.nn.Sequential(model.student), model.parameters()))


def test_soft_teacher(tmp_path, shapes):
    """Of mmdet: the teacher is the running mean of the student."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    runner = RUNNERS.build(soft_teacher_config(tmp_path, shapes))
    model = runner.model
    runner.train()
    (decision,) = decisions(tmp_path / 'work')
    assert len(decision.pruned) == 2
    names = {name.replace('student.', 'teacher.') for name in decision.pruned}
    assert all(layer.stage.startswith('student.backbone') for layer in decision.layers)
    assert set(pruned(model)) == {*decision.pruned, *names}
    attentions = layer_attentions(model)
    for name, found in states(model.student).items():
        assert attentions[f'teacher.{name}'].attention_state == found
    assert AttentionState.PRUNED in states(model.teacher).values()


def soft_teacher_config(tmp_path, shapes):
    """mmdet's config with narrow networks, small images and few steps."""
    path = Path(tmp_path) / 'config.py'
    path.write_text(
        "_base_ = ['mmdet::soft_teacher/"
        "soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py']\n"
    )
    cfg = Config.fromfile(path)
    detector = cfg.model.detector
    detector.backbone.update(
        type='ELAResNet',
        base_channels=8,
        layer_attention=dict(type='MRLABase', head_dim=8),
        init_cfg=None,
    )
    detector.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    detector.rpn_head.update(in_channels=16, feat_channels=16)
    detector.roi_head.bbox_roi_extractor.out_channels = 16
    detector.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    detector.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)

    def shrink(node):
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, (dict, list, tuple)):
                shrink(value)
        if isinstance(node, dict):
            if 'scale' in node:
                node['scale'] = (64, 64)
            if node.get('type') == 'RandomResize':
                node['type'] = 'Resize'
            if 'data_root' in node:
                node['data_root'] = f'{shapes}/'
                node['ann_file'] = 'annotations/instances_train2017.json'
                node['data_prefix'] = dict(img='train2017/')
                # Or a step may get images without objects
                node['filter_cfg'] = None

    loader = cfg.train_dataloader
    shrink(loader.dataset)
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    loader.sampler.update(batch_size=2, source_ratio=[1, 1])
    for split in ('val', 'test'):
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{split}_{part}'] = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=100)
    cfg.default_hooks.checkpoint = None
    cfg.custom_hooks.append(
        dict(
            type='LayerAttentionPruningHook',
            windows=[(1, 2)],
            by_epoch=False,
            policy=dict(type='FixedCount', count=2),
            followers=dict(teacher='student'),
        )
    )
    cfg.work_dir = str(tmp_path / 'work')
    cfg.randomness = dict(seed=0)
    return cfg
