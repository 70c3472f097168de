import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import mmela  # noqa: F401


def test_log_history_loads_safely(tmp_path):
    """What mmengine puts into each of its checkpoints."""
    buffer = HistoryBuffer()
    for value in (1.0, np.float64(2.0), 6):
        buffer.update(value)
    content = dict(buffer=buffer, scalar=np.float32(3), flag=np.bool_(True))
    torch.save(content, tmp_path / 'x.pth')
    loaded = torch.load(tmp_path / 'x.pth', weights_only=True)
    assert loaded['buffer'].mean() == 3
    assert loaded['buffer'].statistics('max') == 6
    assert loaded['scalar'] == 3 and loaded['flag']


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    'evil',
    [
        Evil(getattr, HistoryBuffer, '__init__'),
        Evil(getattr, np.ndarray, 'tofile'),
        Evil(getattr, 'x', 'upper'),
        Evil(eval, '1'),
        Evil(print, 'executed'),
    ],
    ids=['method', 'ndarray', 'str', 'eval', 'print'],
)
def test_other_code_is_still_refused(tmp_path, evil):
    torch.save(dict(x=evil), tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'x.pth', weights_only=True)
