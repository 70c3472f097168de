"""One network used by many threads at once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.helpers.backbones import (
    ATTENTIONS,
    MMDET,
    MMPRETRAIN,
    build,
)

THREADS = 16


@pytest.mark.parametrize('attention', ['MRLABase', 'MRLALight', 'KCLA'])
@pytest.mark.parametrize(
    'scope, backbone',
    [
        (scope, backbone)
        for scope, backbones in (('mmpretrain', MMPRETRAIN), ('mmdet', MMDET))
        for backbone in backbones
    ],
)
def test_results_are_those_of_one_thread(scope, backbone, attention):
    model = build(scope, backbone, ATTENTIONS[attention])
    model.eval()
    sizes = [(64, 64)] * 2 if 'Vision' in backbone else [(64, 64), (65, 97)]
    images = [torch.randn(1, 3, *sizes[i % 2]) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    start = Barrier(THREADS)

    def run(x):
        start.wait()
        with torch.no_grad():
            return [model(x) for _ in range(2)]

    with ThreadPoolExecutor(THREADS) as pool:
        for outs, e in zip(pool.map(run, images), expected):
            for out in outs:
                assert len(out) == len(e)
                assert all(torch.equal(a, b) for a, b in zip(out, e))
