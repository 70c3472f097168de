import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from mmela.pruning import attention_kl


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
    kl = attention_kl(log(1.), log(0.5, 0.25, 0.25), eps=1e-2)
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
    kl = attention_kl(log(1., 0.), log(0.5, 0.25, 0.25))
    assert kl == pytest.approx(math.log(2), abs=1e-6)


def test_saturated_attention_is_finite():
    """Where a softmax gives exactly 0, its logarithm is still a number."""
    p = torch.tensor([0., -1e4]).log_softmax(-1)
    q = torch.tensor([-1e4, 0., 0.]).log_softmax(-1)
    assert q.exp()[0] == 0
    # All of P lies on a token of log-probability -1e4 - ln 2; eps adds 1e-7
    assert attention_kl(p, q) == pytest.approx(1e4 + math.log(2), rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_torch_agrees_with_numpy(dtype):
    torch.manual_seed(0)
    p = (10 * torch.randn(2, 3, 4, dtype=dtype)).log_softmax(-1)
    q = (10 * torch.randn(2, 3, 6, dtype=dtype)).log_softmax(-1)
    found = attention_kl(p, q)
    assert found.shape == (2, 3) and found.dtype == dtype
    np.testing.assert_allclose(
        found, attention_kl(p.numpy(), q.numpy()), rtol=1e-4)


@pytest.mark.parametrize('tokens', [1, 2])
def test_later_block_must_see_more(tokens):
    with pytest.raises(ValueError, match=f'over {tokens} tokens .* over 2'):
        attention_kl(np.zeros(2), np.zeros(tokens))


@pytest.mark.parametrize('eps', [0, -1e-8, 1, math.nan])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=f'eps={eps}'):
        attention_kl(np.zeros(1), np.zeros(2), eps=eps)
