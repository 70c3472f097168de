import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmela.pruning import PRUNING_POLICIES, ebqm

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
    return PRUNING_POLICIES.build({**cfg, **kwargs})


@st.composite
def networks(draw):
    """KL divergences of some stages; the first of each is unmeasured."""
    depths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    stages = np.repeat(np.arange(len(depths)), depths)
    measured = np.diff(stages, prepend=-1) == 0
    kl = draw(
        st.lists(
            st.integers(0, 10**6).map(lambda n: n / 1024),
            min_size=len(stages),
            max_size=len(stages),
        )
    )
    return np.where(measured, kl, nan), stages, measured


@given(values, st.floats(0.01, 1), st.floats(0, 1))
def test_ebqm_is_the_function(kl, gamma, mu):
    decision = build(dict(type='EBQM', gamma=gamma, mu=mu))(
        [nan, *kl], [0] * (len(kl) + 1), [False] + [True] * len(kl)
    )
    assert decision.skip[1:].tolist() == ebqm(kl, gamma=gamma, mu=mu).skip.tolist()


@given(networks(), policies)
def test_unmeasured_layers_stay(network, policy):
    kl, stages, measured = network
    for scope in ('network', 'stage'):
        decision = build(policy, scope=scope)(kl, stages, measured)
        assert not decision.skip[~measured].any()


@given(networks(), policies, st.randoms(use_true_random=False))
def test_permutation_equivariant(network, policy, random):
    """But for ties, which the order decides."""
    kl, stages, measured = network
    kl = kl + np.arange(len(kl)) / 2**20
    order = list(range(len(kl)))
    random.shuffle(order)
    whole = build(policy)(kl, stages, measured)
    shuffled = build(policy)(kl[order], stages[order], measured[order])
    assert shuffled.skip.tolist() == whole.skip[order].tolist()


@given(networks(), policies, st.sampled_from([0.25, 2.0, 1024.0]))
def test_scale_invariant(network, policy, factor):
    """A factor that is a power of two changes no rounding."""
    kl, stages, measured = network
    one = build(policy)(kl, stages, measured)
    other = build(policy)(kl * factor, stages, measured)
    assert one.skip.tolist() == other.skip.tolist()


@given(networks(), policies, st.sampled_from([-512.0, 0.5, 1024.0]))
def test_shift_invariant(network, policy, shift):
    """The values are multiples of 1 / 1024: no sum is rounded."""
    kl, stages, measured = network
    one = build(policy)(kl, stages, measured)
    other = build(policy)(kl + shift, stages, measured)
    assert one.skip.tolist() == other.skip.tolist()


@given(networks(), st.sampled_from(['gamma', 'exponential', None]))
def test_ranks_alone_matter_for_some(network, target):
    policy = (
        dict(type='QuantileMapping', target=target)
        if target
        else dict(type='FixedCount', count=3)
    )
    kl, stages, measured = network
    one = build(policy)(kl, stages, measured)
    other = build(policy)(kl**2, stages, measured)
    assert one.skip.tolist() == other.skip.tolist()


def test_distances_matter_for_ebqm():
    policy = build(dict(type='EBQM', gamma=1, mu=0.5))
    # x = 1/4: CDF = 1 - (3/4)^6 - 6/4 (3/4)^5 = 0.466; of the roots, x = 1/2:
    # CDF = 57/64
    assert policy([0, 1, 4]).skip.tolist() == [1, 1, 0]
    assert policy([0, 1, 2]).skip.tolist() == [1, 0, 0]


@given(networks(), policies, st.floats(0, 1), st.floats(0, 1))
def test_monotone_in_mu(network, policy, a, b):
    if policy['type'] == 'FixedCount':
        return
    low, high = sorted((a, b))
    fewer = build(policy, mu=low)(*network).skip
    more = build(policy, mu=high)(*network).skip
    assert (fewer <= more).all()


@given(networks(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_monotone_in_gamma(network, a, b):
    """A larger set S has a larger maximum: normalised values only shrink.

    It needs a set that is not degenerate, from which nothing is skipped.
    """
    low, high = sorted((a, b))
    fewer = build(dict(type='EBQM', gamma=low, mu=0.5))(*network).skip
    more = build(dict(type='EBQM', gamma=high, mu=0.5))(*network).skip
    assert (fewer <= more).all()


@given(networks(), policies)
def test_stage_scope_is_each_stage_alone(network, policy):
    kl, stages, measured = network
    whole = build(policy, scope='stage')(kl, stages, measured)
    for stage in np.unique(stages):
        part = stages == stage
        alone = build(policy)(kl[part], stages[part], measured[part])
        assert whole.skip[part].tolist() == alone.skip.tolist()


@given(networks(), policies, st.integers(1, 4), st.integers(0, 5))
def test_limits(network, policy, min_active, max_pruned):
    kl, stages, measured = network
    free = build(policy)(kl, stages, measured)
    limited = build(policy, min_active_per_stage=min_active, max_pruned=max_pruned)(
        kl, stages, measured
    )
    assert limited.skip.sum() <= max_pruned
    assert (limited.skip <= free.skip).all()
    for stage in np.unique(stages):
        part = stages == stage
        if limited.skip[part].any():
            assert (~limited.skip[part]).sum() >= min_active
    # Without the limit on stages, the smallest go first.
    capped = build(policy, max_pruned=max_pruned)(kl, stages, measured)
    if capped.skip.any() and (free.skip & ~capped.skip).any():
        assert kl[capped.skip].max() <= kl[free.skip & ~capped.skip].min()


@settings(max_examples=50)
@given(networks(), policies)
def test_rows_are_json(network, policy):
    kl, stages, measured = network
    decision = build(policy)(kl, stages, measured)
    rows = json.loads(json.dumps(decision.rows(), allow_nan=False))
    assert [row['skip'] for row in rows] == decision.skip.tolist()
    assert [row['kl'] is None for row in rows] == (~measured).tolist()
    for row in rows:
        assert row['reason'].startswith('pruned' if row['skip'] else 'kept')


def test_scopes_by_hand():
    kl = [math.inf, 1, 2, 6, nan, 10, 30, 50]
    network = [0] * 4 + [1] * 4, [False, True, True, True] * 2
    # Of 1 2 6 10 30 50 the median is 8; x = 0, 1/5, 1. By the closed form
    # CDF(1/5) = 1 - 0.8^6 - 6/5 0.8^5 = 0.34464
    whole = build(dict(type='EBQM', mu=0.3))(kl, *network)
    # What is unmeasured is ignored, whatever stands there.
    np.testing.assert_allclose(whole.kl, [nan, 1, 2, 6, nan, 10, 30, 50])
    np.testing.assert_allclose(whole.quantile, [nan, 8, 8, 8] * 2)
    assert whole.selected.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(whole.mapped, [nan, 0, 0.34464, 1, nan, nan, nan, nan])
    assert whole.skip.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert whole.reasons == (
        'kept: first of its stage, not measured',
        'pruned: 0 < 0.3',
        'kept: 0.345 >= 0.3',
        'kept: 1 >= 0.3',
        'kept: first of its stage, not measured',
        'kept: above the quantile',
        'kept: above the quantile',
        'kept: above the quantile',
    )
    # The medians of the stages are 2 and 30.
    parts = build(dict(type='EBQM', mu=0.3, scope='stage'))(kl, *network)
    np.testing.assert_allclose(parts.quantile, [nan, 2, 2, 2, nan, 30, 30, 30])
    assert parts.selected.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]
    assert parts.skip.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]


def test_limits_by_hand():
    stages, measured = [0, 0, 0, 1, 1], [False, True, True, False, True]
    policy = dict(type='FixedCount', count=9)
    # The first of a stage counts as active.
    two = build(policy, min_active_per_stage=2)([nan, 2, 1, nan, 0], stages, measured)
    assert two.skip.tolist() == [0, 0, 1, 0, 0]
    assert two.reasons[1] == two.reasons[4] == 'kept: min_active_per_stage=2'
    # The smallest first, of equal ones the earlier
    one = build(policy, max_pruned=2)([nan, 1, 1, nan, 0], stages, measured)
    assert one.skip.tolist() == [0, 1, 0, 0, 1]
    assert one.reasons[2] == 'kept: max_pruned=2'


@pytest.mark.parametrize('type', ['EBQM', 'Threshold', 'QuantileMapping'])
@pytest.mark.parametrize('kl', [[], [1.0], [2.0, 2.0, 2.0]])
def test_nothing_to_tell_apart(type, kl):
    for scope in ('network', 'stage'):
        decision = build(dict(type=type, mu=1, scope=scope))(kl)
        assert decision.skip.tolist() == [False] * len(kl)
        assert set(decision.reasons) <= {'kept: too few different values'}


def test_quantile_mapping_prunes_a_fixed_share():
    # The Exponential target has F(0.3) = 1 - e^-0.3 = 0.259, so 25 of
    # 100 distinct values have p < F(mu), p being 0.01, 0.02, ...
    decision = build(dict(type='QuantileMapping', target='exponential'))(
        np.geomspace(1e-3, 30, 100)
    )
    assert decision.skip.tolist() == [True] * 25 + [False] * 75
    # The largest: -ln(1 / 200) = 5.298, finite
    assert decision.mapped[-1] == pytest.approx(5.298, abs=1e-3)


def test_threshold_by_hand():
    # Normalised: 0, 1/4, 1/2, 1
    decision = build(dict(type='Threshold', mu=0.3))([1, 2, 3, 5])
    np.testing.assert_allclose(decision.normalized, [0, 0.25, 0.5, 1])
    assert decision.skip.tolist() == [1, 1, 0, 0]


def test_threshold_is_not_invariant_to_outliers():
    """What EBQM's quantile is for (ELA, section 3.3)."""
    policy = dict(type='Threshold', mu=0.3)
    assert build(policy)([1, 2, 3, 5]).skip.sum() == 2
    assert build(policy)([1, 2, 3, 5, 100]).skip.sum() == 4


def test_fixed_count_by_hand():
    decision = build(dict(type='FixedCount', count=2))([3, 1, 2, 1])
    assert decision.skip.tolist() == [0, 1, 0, 1]


def test_ties_go_to_the_earlier_layer():
    decision = build(dict(type='FixedCount', count=1))([2, 1, 1])
    assert decision.skip.tolist() == [0, 1, 0]


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
    np.testing.assert_allclose(decision.mapped, distribution.ppf(p))
    assert decision.skip.tolist() == (distribution.ppf(p) < 0.3).tolist()


def test_error_names_the_layer():
    with pytest.raises(ValueError, match='layer2.1 is nan'):
        build(dict(type='EBQM'))(
            [nan, nan], [0, 0], [False, True], ['layer2.0', 'layer2.1']
        )


@pytest.mark.parametrize(
    'cfg, match',
    [
        (dict(type='EBQM', scope='block'), "scope='block'.*'network' and 'stage'"),
        (dict(type='EBQM', mapping='tanh'), "mapping='tanh'.*'sigmoid'"),
        (dict(type='EBQM', min_active_per_stage=0), 'min_active_per_stage=0'),
        (dict(type='EBQM', max_pruned=-1), 'max_pruned=-1'),
        (dict(type='FixedCount', count=1.5), 'count=1.5'),
        (dict(type='FixedCount', count=True), 'count=True'),
        (dict(type='Threshold', mu=2), 'mu=2'),
        (dict(type='QuantileMapping', target='beta'), "target='beta'"),
        (dict(type='QuantileMapping', scale=0), 'scale=0'),
    ],
)
def test_bad_arguments(cfg, match):
    with pytest.raises(ValueError, match=match):
        build(cfg)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='kl has 2 entries, stages 1'):
        build(dict(type='EBQM'))([1, 2], [0])


def test_repr_shows_the_arguments():
    text = repr(build(dict(type='EBQM', gamma=0.4, max_pruned=3)))
    assert text.startswith('EBQM(') and 'gamma=0.4' in text
    assert 'max_pruned=3' in text
