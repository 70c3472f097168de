"""Results of a run with the pruning hook."""

from pathlib import Path

import numpy as np
from mmengine.model import is_model_wrapper
from scipy.stats import entropy

from mmela.layers import AttentionState
from mmela.pruning import PruningReport
from mmela.structure import layer_attentions

POLICY = dict(type='EBQM', gamma=0.5, alpha=2, beta=5, mu=0.9)
HOOK = dict(windows=[(1, 1), (3, 3)], policy=POLICY)


def states(model):
    """State of each layer attention, by name."""
    if is_model_wrapper(model):
        model = model.module
    return {n: a.attention_state for n, a in layer_attentions(model).items()}


def pruned(model):
    """Names of attentions that are not active."""
    return [n for n, s in states(model).items() if s != AttentionState.ACTIVE]


def decisions(work_dir):
    """Decisions in pruning.json."""
    return PruningReport.read(Path(work_dir) / 'pruning.json').decisions


def divergences(decision):
    """Measured divergences of a decision."""
    return [x.divergence for x in decision.layers if x.divergence is not None]


def padded_kl(p, q, eps=1e-8):
    """ELA, eq. 8, by scipy, without its normalization."""
    head, rest = np.split(q, [p.shape[-1]], axis=-1)
    kl = entropy(p, head, axis=-1) - np.log(head.sum(-1))
    return kl + (eps * np.log(eps / rest)).sum(-1)


def log_of(runner):
    """Read the log of a run."""
    return ''.join(p.read_text() for p in Path(runner._log_dir).glob('*.log'))
