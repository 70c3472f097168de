"""Invariants that hold for every config."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmela.convert.slim import slim_state_dict
from mmela.layers import AttentionState
from mmela.structure import layer_attentions, prune
from tests.helpers.toy import toy_config, train

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmdet.registry import MODELS  # noqa: E402

from tests.helpers.runs import decisions  # noqa: E402

BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3]}


@st.composite
def backbones(draw):
    """Config of a backbone, names to prune, and which of them keep values."""
    depth = draw(st.sampled_from(sorted(BLOCKS)))
    num_stages = draw(st.integers(1, 4))
    cfg = dict(
        type='ELAResNet',
        depth=depth,
        base_channels=8,
        num_stages=num_stages,
        strides=draw(
            st.lists(st.sampled_from([1, 2]), min_size=num_stages, max_size=num_stages)
        ),
        dilations=[1] * num_stages,
        out_indices=[num_stages - 1],
        deep_stem=draw(st.booleans()),
        style=draw(st.sampled_from(['pytorch', 'caffe'])),
        layer_attention=dict(
            type='MRLABase',
            head_dim=draw(st.sampled_from([1, 2, 4, 8])),
            drop_path=draw(st.sampled_from([0.0, 0.3])),
            zero_init=draw(st.booleans()),
        ),
    )
    names = [
        f'layer{stage + 1}.{block}.layer_attn'
        for stage in range(num_stages)
        for block in range(1, BLOCKS[depth][stage])
    ]
    steps = draw(
        st.lists(
            st.tuples(
                st.lists(st.sampled_from(names), max_size=6) if names else st.just([]),
                st.booleans(),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return cfg, steps


def pruned(model):
    return {
        name
        for name, attention in layer_attentions(model).items()
        if attention.attention_state == AttentionState.PRUNED
    }


@settings(max_examples=20, deadline=None)
@given(backbones(), st.integers(1, 3), st.integers(0, 2**31))
def test_backbone(config, batch, seed):
    cfg, steps = config
    torch.manual_seed(seed)
    model = MODELS.build(cfg)
    for attention in layer_attentions(model).values():
        torch.nn.init.normal_(attention.norm.weight)
    x = torch.randn(batch, 3, 33, 41)
    before = set()
    for names, keep_value in steps:
        prune(model, names, keep_value)
        # What is gone stays gone.
        assert before <= pruned(model)
        before = pruned(model)
        assert all(torch.isfinite(out).all() for out in model(x))

    model.eval()
    state_dict = model.state_dict()
    expected = model(x)

    again = MODELS.build(cfg)
    again.eval()
    again.load_state_dict(state_dict)
    assert pruned(again) == pruned(model)
    assert all(torch.equal(a, b) for a, b in zip(again(x), expected))

    slim_state, blocks = slim_state_dict(again)
    slim = MODELS.build(dict(cfg, blocks=blocks['']))
    slim.eval()
    slim.load_state_dict(slim_state)
    assert not pruned(slim)
    assert all(torch.equal(a, b) for a, b in zip(slim(x), expected))


@st.composite
def windows(draw):
    bounds = sorted(
        draw(st.lists(st.integers(1, 5), min_size=2, max_size=4, unique=True))
    )
    if len(bounds) % 2:
        bounds.append(bounds[-1] + 1)
    return list(zip(bounds[::2], bounds[1::2]))


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    windows(),
    st.sampled_from(
        [
            dict(type='EBQM', mu=0.9),
            dict(type='EBQM', mapping='sigmoid', scope='stage'),
            dict(type='EBQM', mapping='gamma', gamma=1.0, mu=1.0),
            dict(type='FixedCount', count=2),
            dict(type='Threshold', max_pruned=2),
            dict(type='QuantileMapping', min_active_per_stage=2),
        ]
    ),
    st.booleans(),
    st.sampled_from(['mean_kl', 'mean_distribution']),
)
def test_run(tmp_path_factory, windows, policy, keep_value, reduction):
    """Masks only grow, and each decision sees what the last one left."""
    work_dir = tmp_path_factory.mktemp('run')
    runner = train(
        toy_config(
            work_dir,
            dict(
                windows=windows,
                policy=policy,
                keep_value=keep_value,
                reduction=reduction,
            ),
            epochs=6,
            size=4,
        )
    )
    found = decisions(work_dir)
    assert [decision.window for decision in found] == windows
    active = list(layer_attentions(runner.model))
    for decision in found:
        assert [layer.name for layer in decision.layers] == active
        active = [name for name in active if name not in decision.pruned]
        assert list(decision.active) == active
        assert {'layer1.0.layer_attn', 'layer2.0.layer_attn'} <= set(active)
    assert active == [
        name for name, a in layer_attentions(runner.model).items() if a.active
    ]
