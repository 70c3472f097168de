import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import entropy

from mmela.pruning import Divergence, attention_kl, safe_log, split_kl

inf = math.inf
# Scores as they come, saturated, and masked
scores = st.one_of(st.floats(-50, 50), st.sampled_from([-1e4, -inf]))


def log(*probs):
    with np.errstate(divide='ignore'):
        return np.log(np.array(probs))


def test_by_hand():
    # P = (1/2, 1/2, eps), P' = (1/4, 1/4, 1/2), eps = 1e-2:
    # 2 * 1/2 * ln 2 + 0.01 * ln(0.01 / 0.5) = 0.693147 - 0.039120
    kl = attention_kl(log(0.5, 0.5), log(0.25, 0.25, 0.5), eps=1e-2)
    assert kl == pytest.approx(0.693147 - 0.039120, abs=1e-6)


def test_several_missing_tokens():
    # P = (1, eps, eps), P' = (1/2, 1/4, 1/4):
    # ln 2 + 2 * 0.01 * ln(0.01 / 0.25) = 0.693147 - 0.064378
    kl = attention_kl(log(1.0), log(0.5, 0.25, 0.25), eps=1e-2)
    assert kl == pytest.approx(0.693147 - 0.064378, abs=1e-6)


def test_against_scipy():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 10), rng.dirichlet(np.ones(5), 10)
    # scipy normalises the truncated Q; the missing mass comes back by hand.
    mass = q[:, :4].sum(1)
    expected = entropy(p, q[:, :4], axis=1) - np.log(mass)
    found = attention_kl(np.log(p), np.log(q), eps=1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_probability_zero_contributes_nothing():
    kl = attention_kl(log(1.0, 0.0), log(0.5, 0.25, 0.25))
    assert kl == pytest.approx(math.log(2), abs=1e-6)


def test_saturated_attention_is_finite():
    """Where a softmax gives exactly 0, its logarithm is still a number."""
    p = torch.tensor([0.0, -1e4]).log_softmax(-1)
    q = torch.tensor([-1e4, 0.0, 0.0]).log_softmax(-1)
    assert q.exp()[0] == 0
    # All of P lies on a token of log-probability -1e4 - ln 2; eps adds 1e-7
    assert attention_kl(p, q) == pytest.approx(1e4 + math.log(2), rel=1e-6)


@pytest.mark.parametrize('kind', [np.array, torch.tensor])
@pytest.mark.parametrize('p', [-inf, -1e4])
@pytest.mark.parametrize('q', [-inf, -1e4, math.log(0.25)])
def test_underflow_of_both_is_no_nan(kind, p, q):
    """exp(-1e4) is exactly 0, as exp(-inf) is: 0 log(0 / q) counts as 0."""
    half = math.log(0.5)
    with np.errstate(invalid='raise'):
        kl = attention_kl(kind([0.0, p]), kind([half, q, half]))
    # 1 * ln(1 / 0.5); eps adds 1e-8 * ln(1e-8 / 0.5) = -2e-7
    assert float(kl) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize('kind', [np.array, torch.tensor])
def test_infinite_where_only_the_later_is_zero(kind):
    half = math.log(0.5)
    assert attention_kl(kind([half, half]), kind([0.0, -inf, half])) == inf
    assert attention_kl(kind([0.0]), kind([0.0, -inf])) == inf


@given(
    st.lists(scores, min_size=1, max_size=5),
    st.lists(scores, min_size=1, max_size=3),
    st.data(),
)
def test_any_scores(p, new, data):
    """Never NaN or negative, and the same in torch.

    The padded P has the mass m = 1 + n eps; by the log-sum inequality the
    divergence is then at least m ln m > 0.
    """
    q = data.draw(st.lists(scores, min_size=len(p), max_size=len(p))) + new
    # A softmax needs a finite score.
    log_p = log_softmax([*p, 0.0])
    log_q = log_softmax([0.0, *q])
    with np.errstate(invalid='raise'):
        kl = attention_kl(log_p, log_q)
    assert kl > -1e-9
    found = attention_kl(torch.tensor(log_p), torch.tensor(log_q))
    assert float(found) == pytest.approx(kl, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_numpy_keeps_the_dtype(dtype):
    assert attention_kl(np.zeros((2, 1), dtype), np.zeros((2, 2), dtype)).dtype == dtype


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_safe_log(dtype):
    probs = np.array([0.0, 0.25, 1.0], dtype)
    expected = [np.log(np.finfo(dtype).tiny), math.log(0.25), 0.0]
    found = safe_log(probs), safe_log(torch.tensor(probs)).numpy()
    for log_probs in found:
        assert log_probs.dtype == dtype
        np.testing.assert_allclose(log_probs, expected, rtol=1e-6)


def test_mean_distributions_that_underflowed_are_finite():
    # P = (1, 0), P' = (1, 0, 0), eps * ln(eps / tiny) for the missing token:
    # 1e-8 * (-18.42 + 708.40) = 6.8998e-06
    kl = attention_kl(
        safe_log(np.array([1.0, 0.0])), safe_log(np.array([1.0, 0.0, 0.0]))
    )
    assert kl == pytest.approx(6.8998e-06, rel=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_torch_agrees_with_numpy(dtype):
    torch.manual_seed(0)
    p = (10 * torch.randn(2, 3, 4, dtype=dtype)).log_softmax(-1)
    q = (10 * torch.randn(2, 3, 6, dtype=dtype)).log_softmax(-1)
    found = attention_kl(p, q)
    assert found.shape == (2, 3) and found.dtype == dtype
    np.testing.assert_allclose(found, attention_kl(p.numpy(), q.numpy()), rtol=1e-4)


def test_later_block_must_not_see_fewer():
    with pytest.raises(ValueError, match='over 1 tokens .* over 2'):
        attention_kl(np.zeros(2), np.zeros(1))


def test_the_same_tokens():
    """All is shape: 1/4 ln(1/2) + 3/4 ln(3/2)."""
    shape, own = split_kl(np.log([0.25, 0.75]), np.log([0.5, 0.5]))
    assert shape == pytest.approx(0.130812, abs=1e-6)
    assert own == pytest.approx(0, abs=1e-12)
    assert Divergence(0.1, 0.0, 2, 0).baseline == 0


@pytest.mark.parametrize('eps', [0, -1e-8, 1, math.nan])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=f'eps={eps}'):
        attention_kl(np.zeros(1), np.zeros(2), eps=eps)


def test_parts_by_hand():
    # P = (3/4, 1/4), Q = (1/4, 1/4, 1/2): Q' = (1/2, 1/2), and 1/2 is new.
    # Shape: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; own: ln 2 + eps term
    shape, own = split_kl(log(0.75, 0.25), log(0.25, 0.25, 0.5), eps=1e-2)
    assert shape == pytest.approx(0.130812, abs=1e-6)
    assert own == pytest.approx(0.693147 - 0.039120, abs=1e-6)


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=6),
    st.lists(st.floats(-30, 30), min_size=3, max_size=9),
)
def test_parts_add_up(first, second):
    """To eq. 8 as it stands, term by term, whatever the attentions."""
    p, q = log_softmax(first), log_softmax(second + [0.0] * len(first))
    shape, own = split_kl(p, q)
    eps = 1e-8
    padded = np.concatenate([np.exp(p), np.full(len(q) - len(p), eps)])
    total = (padded * (np.log(padded) - q)).sum()
    assert shape >= 0
    assert shape + own == pytest.approx(total, rel=1e-9, abs=1e-9)
    for part, same in zip((shape, own), split_kl(torch.tensor(p), torch.tensor(q))):
        assert float(same) == pytest.approx(float(part), abs=1e-9)


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=6),
    st.lists(st.floats(-5, 20), min_size=1, max_size=3),
)
def test_equal_mixtures_have_no_shape(shared, new):
    """However much the later attention looks at its own tokens."""
    p, q = log_softmax(shared), log_softmax(shared + new)
    shape, own = split_kl(p, q, eps=1e-12)
    assert shape == pytest.approx(0, abs=1e-9)
    assert own == pytest.approx(-np.log(np.exp(q[: len(p)]).sum()), abs=1e-9)


@pytest.mark.parametrize('tokens, more', [(1, 1), (3, 1), (5, 2)])
def test_uniform_attention_has_the_baseline(tokens, more):
    p, q = np.zeros(tokens), np.zeros(tokens + more)
    shape, own = split_kl(log_softmax(p), log_softmax(q), eps=1e-12)
    divergence = Divergence(float(shape), float(own), tokens, more)
    assert divergence.shape == pytest.approx(0, abs=1e-12)
    assert divergence.baseline == pytest.approx(math.log((tokens + more) / tokens))
    assert divergence.total == pytest.approx(divergence.baseline, abs=1e-9)


def test_parts_where_nothing_shared_is_kept():
    shape, own = split_kl(log(0.5, 0.5), log(0.0, 0.0, 1.0))
    assert (shape, own) == (0, inf)


def test_a_number_that_is_none_is_not_hidden():
    """NaN must reach the check that names the layer."""
    for kind in (np.array, torch.tensor):
        parts = split_kl(kind([math.nan, 0.0]), kind([-1.0, -1.0, -1.0]))
        assert math.isnan(parts[0])
