import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmela.pruning import Divergence, FixedCount, PruningDecision, build_policy, ebqm

nan = math.nan

# Far enough apart that scaling by a power of two cannot merge them
values = st.lists(
    st.integers(0, 10**6).map(lambda n: n / 1024), min_size=1, max_size=12
)
policies = st.sampled_from(
    [
        dict(type='EBQM', mu=0.6),
        dict(type='EBQM', alpha=5, beta=1, mu=0.3, gamma=0.8),
        dict(type='EBQM', mapping='normal'),
        dict(type='EBQM', mapping='gamma'),
        dict(type='EBQM', mapping='softmax'),
        dict(type='EBQM', mapping='sigmoid'),
        dict(type='Threshold'),
        dict(type='FixedCount', count=3),
        dict(type='FixedCount', count=100),
        dict(type='QuantileMapping'),
        dict(type='QuantileMapping', target='exponential'),
    ]
)


def build(cfg, **kwargs):
    return build_policy({**cfg, **kwargs})


def skip(layers):
    return np.array([layer.pruned for layer in layers], dtype=bool)


@st.composite
def networks(draw):
    """Divergences and stages of attentions; the first of a stage has none."""
    depths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    stages = [f'layer{i}' for i, depth in enumerate(depths) for _ in range(depth)]
    kl = draw(
        st.lists(
            st.integers(0, 10**6).map(lambda n: n / 1024),
            min_size=len(stages),
            max_size=len(stages),
        )
    )
    first = [stages.index(stage) == i for i, stage in enumerate(stages)]
    return [None if f else value for f, value in zip(first, kl)], stages


def change(kl, function):
    return [None if value is None else function(value) for value in kl]


@given(values, st.floats(0.01, 1), st.floats(0, 1))
def test_ebqm_is_the_function(kl, gamma, mu):
    layers = build(dict(type='EBQM', gamma=gamma, mu=mu))([None, *kl])
    assert skip(layers)[1:].tolist() == ebqm(kl, gamma=gamma, mu=mu).skip.tolist()


@given(networks(), policies)
def test_unmeasured_layers_stay(network, policy):
    for scope in ('network', 'stage'):
        for layer in build(policy, scope=scope)(*network):
            if layer.divergence is None:
                assert not layer.pruned and not layer.selected
                assert layer.reason == 'kept: first of its stage, not measured'


@given(networks(), policies, st.randoms(use_true_random=False))
def test_permutation_equivariant(network, policy, random):
    """But for ties, which the order decides."""
    kl, stages = network
    kl = [None if v is None else v + i / 2**20 for i, v in enumerate(kl)]
    order = list(range(len(kl)))
    random.shuffle(order)
    whole = build(policy)(kl, stages)
    shuffled = build(policy)([kl[i] for i in order], [stages[i] for i in order])
    assert skip(shuffled).tolist() == skip(whole)[order].tolist()


@given(networks(), policies, st.sampled_from([0.25, 2.0, 1024.0]))
def test_scale_invariant(network, policy, factor):
    """A factor that is a power of two changes no rounding."""
    kl, stages = network
    one = build(policy)(kl, stages)
    other = build(policy)(change(kl, lambda v: v * factor), stages)
    assert skip(one).tolist() == skip(other).tolist()


@given(networks(), policies, st.sampled_from([-512.0, 0.5, 1024.0]))
def test_shift_invariant(network, policy, shift):
    """The values are multiples of 1 / 1024: no sum is rounded."""
    kl, stages = network
    one = build(policy)(kl, stages)
    other = build(policy)(change(kl, lambda v: v + shift), stages)
    assert skip(one).tolist() == skip(other).tolist()


@given(networks(), st.sampled_from(['gamma', 'exponential', None]))
def test_ranks_alone_matter_for_some(network, target):
    policy = (
        dict(type='QuantileMapping', target=target)
        if target
        else dict(type='FixedCount', count=3)
    )
    kl, stages = network
    one = build(policy)(kl, stages)
    other = build(policy)(change(kl, lambda v: v**2), stages)
    assert skip(one).tolist() == skip(other).tolist()


def test_distances_matter_for_ebqm():
    policy = build(dict(type='EBQM', gamma=1, mu=0.5))
    # x = 1/4: CDF = 1 - (3/4)^6 - 6/4 (3/4)^5 = 0.466; of the roots, x = 1/2:
    # CDF = 57/64
    assert skip(policy([0, 1, 4])).tolist() == [1, 1, 0]
    assert skip(policy([0, 1, 2])).tolist() == [1, 0, 0]


@given(networks(), policies, st.floats(0, 1), st.floats(0, 1))
def test_monotone_in_mu(network, policy, a, b):
    if policy['type'] == 'FixedCount':
        return
    low, high = sorted((a, b))
    fewer = skip(build(policy, mu=low)(*network))
    more = skip(build(policy, mu=high)(*network))
    assert (fewer <= more).all()


@given(networks(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_monotone_in_gamma(network, a, b):
    """A larger set S has a larger maximum: normalised values only shrink.

    It needs a set that is not degenerate, from which nothing is skipped.
    """
    low, high = sorted((a, b))
    fewer = skip(build(dict(type='EBQM', gamma=low, mu=0.5))(*network))
    more = skip(build(dict(type='EBQM', gamma=high, mu=0.5))(*network))
    assert (fewer <= more).all()


@given(networks(), policies)
def test_stage_scope_is_each_stage_alone(network, policy):
    kl, stages = network
    whole = build(policy, scope='stage')(kl, stages)
    for stage in set(stages):
        part = [i for i, name in enumerate(stages) if name == stage]
        alone = build(policy)([kl[i] for i in part])
        assert skip(whole)[part].tolist() == skip(alone).tolist()


@given(networks(), policies, st.integers(1, 4), st.integers(0, 5))
def test_limits(network, policy, min_active, max_pruned):
    kl, stages = network
    free = build(policy)(kl, stages)
    limited = build(policy, min_active_per_stage=min_active, max_pruned=max_pruned)(
        kl, stages
    )
    assert skip(limited).sum() <= max_pruned
    assert (skip(limited) <= skip(free)).all()
    for stage in set(stages):
        part = np.array([name == stage for name in stages])
        if skip(limited)[part].any():
            assert (~skip(limited)[part]).sum() >= min_active
    # Without the limit on stages, the smallest go first.
    capped = build(policy, max_pruned=max_pruned)(kl, stages)
    gone = [x.divergence for x in capped if x.pruned]
    kept = [x.divergence for x, y in zip(capped, free) if y.pruned and not x.pruned]
    if gone and kept:
        assert max(gone) <= min(kept)


@settings(max_examples=50)
@given(networks(), policies)
def test_decision_is_json_and_back(network, policy):
    built = build(policy)
    decision = PruningDecision(
        built(*network, [f'a.{i}' for i in range(len(network[0]))]), built.config
    )
    text = json.dumps(decision.to_dict(), allow_nan=False)
    assert PruningDecision.from_dict(json.loads(text)) == decision
    for layer, value in zip(decision.layers, network[0]):
        assert layer.divergence == value
        assert layer.reason.startswith('pruned' if layer.pruned else 'kept')
    # Its config builds the same policy.
    assert vars(build_policy(decision.policy)) == vars(built)


def column(layers, key):
    values = [getattr(layer, key) for layer in layers]
    return [nan if value is None else value for value in values]


def test_scopes_by_hand():
    kl = [None, 1, 2, 6, None, 10, 30, 50]
    stages = ['a'] * 4 + ['b'] * 4
    # Of 1 2 6 10 30 50 the median is 8; x = 0, 1/5, 1. By the closed form
    # CDF(1/5) = 1 - 0.8^6 - 6/5 0.8^5 = 0.34464
    whole = build(dict(type='EBQM', mu=0.3))(kl, stages)
    np.testing.assert_allclose(column(whole, 'quantile'), [nan, 8, 8, 8] * 2)
    assert column(whole, 'selected') == [0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(
        column(whole, 'mapped'), [nan, 0, 0.34464, 1, nan, nan, nan, nan]
    )
    assert {layer.threshold for layer in whole} == {0.3}
    assert column(whole, 'pruned') == [0, 1, 0, 0, 0, 0, 0, 0]
    assert column(whole, 'reason') == [
        'kept: first of its stage, not measured',
        'pruned: 0 < 0.3',
        'kept: 0.345 >= 0.3',
        'kept: 1 >= 0.3',
        'kept: first of its stage, not measured',
        'kept: above the quantile',
        'kept: above the quantile',
        'kept: above the quantile',
    ]
    # The medians of the stages are 2 and 30.
    parts = build(dict(type='EBQM', mu=0.3, scope='stage'))(kl, stages)
    expected = [nan, 2, 2, 2, nan, 30, 30, 30]
    np.testing.assert_allclose(column(parts, 'quantile'), expected)
    assert column(parts, 'selected') == [0, 1, 1, 0, 0, 1, 1, 0]
    assert column(parts, 'pruned') == [0, 1, 0, 0, 0, 1, 0, 0]


def test_limits_by_hand():
    stages = ['a', 'a', 'a', 'b', 'b']
    policy = dict(type='FixedCount', count=9)
    # The first of a stage counts as active.
    two = build(policy, min_active_per_stage=2)([None, 2, 1, None, 0], stages)
    assert skip(two).tolist() == [0, 0, 1, 0, 0]
    assert two[1].reason == two[4].reason == 'kept: min_active_per_stage=2'
    # The smallest first, of equal ones the earlier
    one = build(policy, max_pruned=2)([None, 1, 1, None, 0], stages)
    assert skip(one).tolist() == [0, 1, 0, 0, 1]
    assert one[2].reason == 'kept: max_pruned=2'


def test_threshold_divergence():
    """Where the Beta CDF of the normalised divergence is at mu."""
    kl = [None, 0.3, 0.5, 0.9, 1.1, 4.0]
    policy = build(dict(type='EBQM'))
    layers = policy(kl)
    value = policy.threshold_divergence(layers)
    # Candidates up to the median 0.9 reach from 0.3 to 0.9.
    expected = 0.3 + 0.6 * stats.beta.ppf(0.2, 2, 5)
    assert value == pytest.approx(expected, abs=1e-4)
    for layer in layers:
        if layer.mapped is not None:
            assert layer.pruned == (layer.divergence < value)
    assert policy.threshold_divergence([]) is None
    for other in (dict(type='EBQM', scope='stage'), dict(type='FixedCount', count=2)):
        assert build(other).threshold_divergence(build(other)(kl)) is None


@pytest.mark.parametrize('type', ['EBQM', 'Threshold', 'QuantileMapping'])
@pytest.mark.parametrize('kl', [[], [1.0], [2.0, 2.0, 2.0]])
def test_nothing_to_tell_apart(type, kl):
    for scope in ('network', 'stage'):
        decision = build(dict(type=type, mu=1, scope=scope))(kl)
        assert skip(decision).tolist() == [False] * len(kl)
        assert {x.reason for x in decision} <= {'kept: too few different values'}


def test_quantile_mapping_prunes_a_fixed_share():
    # The Exponential target has F(0.3) = 1 - e^-0.3 = 0.259, so 25 of
    # 100 distinct values have p < F(mu), p being 0.01, 0.02, ...
    decision = build(dict(type='QuantileMapping', target='exponential'))(
        np.geomspace(1e-3, 30, 100)
    )
    assert skip(decision).tolist() == [True] * 25 + [False] * 75
    # The largest: -ln(1 / 200) = 5.298, finite
    assert decision[-1].mapped == pytest.approx(5.298, abs=1e-3)


def test_threshold_by_hand():
    # Normalised: 0, 1/4, 1/2, 1
    decision = build(dict(type='Threshold', mu=0.3))([1, 2, 3, 5])
    np.testing.assert_allclose(column(decision, 'normalized'), [0, 0.25, 0.5, 1])
    assert skip(decision).tolist() == [1, 1, 0, 0]


def test_threshold_is_not_invariant_to_outliers():
    """What EBQM's quantile is for (ELA, section 3.3)."""
    policy = dict(type='Threshold', mu=0.3)
    assert skip(build(policy)([1, 2, 3, 5])).sum() == 2
    assert skip(build(policy)([1, 2, 3, 5, 100])).sum() == 4


def test_fixed_count_by_hand():
    decision = build(dict(type='FixedCount', count=2))([3, 1, 2, 1])
    assert skip(decision).tolist() == [0, 1, 0, 1]


def test_ties_go_to_the_earlier_layer():
    decision = build(dict(type='FixedCount', count=1))([2, 1, 1])
    assert skip(decision).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    'mapping, distribution',
    [
        ('beta', stats.beta(2, 5)),
        # Mean 2/7 and variance 10 / (49 * 8) of Beta(2, 5)
        ('normal', stats.norm(2 / 7, math.sqrt(10 / 392))),
        ('gamma', stats.gamma((2 / 7) ** 2 / (10 / 392), scale=(10 / 392) / (2 / 7))),
    ],
)
def test_mappings_against_scipy(mapping, distribution):
    x = np.linspace(0, 1, 11)
    low, high = distribution.cdf([0, 1])
    expected = (distribution.cdf(x) - low) / (high - low)
    policy = build(dict(type='EBQM', mapping=mapping))
    np.testing.assert_allclose(policy.map(x), expected, atol=1e-12)


@pytest.mark.parametrize('mapping', ['softmax', 'sigmoid'])
def test_activations_by_hand(mapping):
    # softmax over values is proportional to e^x; sigmoid is 1 / (1 + e^-x)
    def f(x):
        return math.exp(x) if mapping == 'softmax' else 1 / (1 + math.exp(-x))

    policy = build(dict(type='EBQM', mapping=mapping))
    expected = (f(0.5) - f(0)) / (f(1) - f(0))
    assert policy.map(np.array([0.5])) == pytest.approx(expected)


@pytest.mark.parametrize(
    'target, distribution',
    [
        ('gamma', stats.gamma(2, scale=0.2)),
        ('exponential', stats.expon()),
    ],
)
def test_quantile_mapping_against_scipy(target, distribution):
    decision = build(dict(type='QuantileMapping', target=target))([4, 1, 2, 3])
    # Empirical probabilities 1, 1/4, 1/2, 3/4; 1 becomes 1 - 1/8
    p = [7 / 8, 1 / 4, 1 / 2, 3 / 4]
    np.testing.assert_allclose(column(decision, 'mapped'), distribution.ppf(p))
    assert skip(decision).tolist() == (distribution.ppf(p) < 0.3).tolist()


def test_error_names_the_layer():
    with pytest.raises(ValueError, match='layer2.1 is nan'):
        build(dict(type='EBQM'))([None, nan], ['layer2'] * 2, ['layer2.0', 'layer2.1'])


@pytest.mark.parametrize(
    'cfg, match',
    [
        (dict(type='EBQM', scope='block'), "scope='block'.*'network', 'stage'"),
        (dict(type='EBQM', mapping='tanh'), "mapping='tanh'.*'sigmoid'"),
        (dict(type='EBQM', min_active_per_stage=0), 'min_active_per_stage=0'),
        (dict(type='EBQM', max_pruned=-1), 'max_pruned=-1'),
        (dict(type='FixedCount', count=1.5), 'count=1.5'),
        (dict(type='FixedCount', count=True), 'count=True'),
        (dict(type='Threshold', mu=2), 'mu=2'),
        (dict(type='QuantileMapping', target='beta'), "target='beta'"),
        (dict(type='QuantileMapping', scale=0), 'scale=0'),
        (
            dict(type='EBQN'),
            r"type 'EBQN' is unknown .did you mean 'EBQM'\?.; allowed are EBQM",
        ),
        (dict(type='subprocess.Popen', args='ls'), 'Popen'),
        (dict(type=dict), "<class 'dict'>"),
        (dict(gamma=0.5), 'has no type; allowed are EBQM'),
        (dict(type='EBQM', gama=0.5), "gama.*'gama'"),
        (dict(type='FixedCount'), 'count'),
    ],
)
def test_bad_arguments(cfg, match):
    with pytest.raises(ValueError, match=match):
        build(cfg)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='divergences has 2 entries, stages 1'):
        build(dict(type='EBQM'))([1, 2], ['a'])


def test_repr_shows_the_arguments():
    text = repr(build(dict(type='EBQM', gamma=0.4, max_pruned=3)))
    assert text.startswith('EBQM(') and 'gamma=0.4' in text
    assert 'max_pruned=3' in text


def test_build_policy_takes_what_a_config_may_hold():
    assert build_policy().config == build_policy(dict(type='EBQM')).config
    policy = build_policy(dict(type=FixedCount, count=2))
    assert policy.count == 2 and build_policy(policy) is policy
    assert build_policy(dict(type='mmela.Threshold', mu=0.1)).mu == 0.1
    assert build_policy().config == dict(
        type='EBQM',
        scope='network',
        min_active_per_stage=1,
        max_pruned=None,
        criterion='total',
        gamma=0.5,
        alpha=2.0,
        beta=5.0,
        mu=0.2,
        mapping='beta',
    )


PARTS = [
    Divergence(*pair, t, 1)
    for t, pair in enumerate(
        [(0.0, 0.1), (0.9, 0.2), (0.1, 0.8), (0.4, 0.1), (0.2, 0.6)], 1
    )
]
# Totals 0.1, 1.1, 0.9, 0.5, 0.8


@pytest.mark.parametrize(
    'criterion, two, by_ebqm',
    [
        # Up to the median 0.1, 0.5, 0.8, normalised 0, 0.57, 1: mapped 0, 0.94, 1
        ('total', [0, 3], [0]),
        # Of 0.9, 0.1, 0.4, 0.2; the first has no shape.
        ('shape', [2, 4], [2]),
        # log((t + 1) / t) falls along the stage.
        ('position', [3, 4], [4]),
    ],
)
def test_criteria(criterion, two, by_ebqm):
    for policy, expected in (
        (dict(type='FixedCount', count=2), two),
        (dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.6), by_ebqm),
    ):
        layers = build_policy(dict(policy, criterion=criterion))(PARTS)
        assert [i for i, layer in enumerate(layers) if layer.pruned] == expected
        for layer, part in zip(layers, PARTS):
            assert layer.divergence == part.total
            assert (layer.shape, layer.own) == (part.shape, part.own)
            assert layer.baseline == part.baseline


def test_one_token_has_no_shape():
    layers = build_policy(dict(type='EBQM', criterion='shape'))(PARTS)
    assert layers[0].reason == 'kept: one token has no shape'
    assert layers[0].value is None and layers[1].value == 0.9


@pytest.mark.parametrize('scope', ['network', 'stage'])
@pytest.mark.parametrize('criterion', ['random', 'position'])
def test_controls_prune_as_many(criterion, scope):
    """With the divergences themselves, dealt out otherwise."""
    rng = np.random.default_rng(0)
    measured = [
        None if i % 6 == 0 else Divergence(*rng.exponential(size=2), i % 6, 1)
        for i in range(24)
    ]
    stages = [f'layer{i // 6}' for i in range(24)]
    decide = {
        name: build_policy(dict(type='EBQM', mu=0.9, scope=scope, criterion=name))
        for name in ('total', criterion)
    }
    total, control = (policy(measured, stages, seed=3) for policy in decide.values())
    assert total != control
    for stage in set(stages) if scope == 'stage' else [None]:
        pools = [
            [x for x in layers if stage in (None, x.stage) and x.value is not None]
            for layers in (total, control)
        ]
        counts = [sum(x.pruned for x in pool) for pool in pools]
        assert counts[0] == counts[1] > 0
        values = [sorted(x.value for x in pool) for pool in pools]
        assert values[0] == values[1]
        if criterion == 'position':
            order = sorted(pools[1], key=lambda x: x.value)
            baselines = [x.baseline for x in order]
            assert baselines == sorted(baselines)


def test_random_choice_is_that_of_its_seed():
    policy = build_policy(dict(type='FixedCount', count=3, criterion='random'))
    measured = [Divergence(0.1 * i, 0.2, i, 1) for i in range(1, 12)]
    choices = {
        tuple(x.pruned for x in policy(measured, seed=[seed, 7])) for seed in range(30)
    }
    assert len(choices) > 20
    # Each is as likely as any other: 3 of 11, within 4 deviations of chance.
    shares = np.mean(
        [[x.pruned for x in policy(measured, seed=s)] for s in range(400)], 0
    )
    assert np.abs(shares - 3 / 11).max() < 4 * np.sqrt(3 / 11 * 8 / 11 / 400)
    assert policy(measured, seed=[1, 7]) == policy(measured, seed=[1, 7])


@pytest.mark.parametrize('criterion', ['shape', 'position'])
def test_numbers_without_parts_are_refused(criterion):
    with pytest.raises(ValueError, match=f"'{criterion}' needs the parts.*layer 1"):
        build_policy(dict(type='EBQM', criterion=criterion))([None, 0.5])


def test_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match="criterion='kl' is unknown.*'position'"):
        build_policy(dict(type='EBQM', criterion='kl'))
