import argparse
import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

import mmela.compat.checkpoints as checkpoints
from mmela.compat.checkpoints import load_checkpoint
from tests.helpers.checkpoint_fuzz import Writer, archive

ROOT = Path(__file__).resolve().parents[2]
needs_safe_loading = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6.0'),
    reason='this torch loads everything',
)
write = Writer(None, 0)


def load(content):
    """What torch reads from the bytes of a file, or of a pickle's body."""
    if not content.startswith(b'PK'):
        content = archive(b'\x80\x02' + content + b'.')
    return torch.load(io.BytesIO(content), weights_only=True)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def dtype(code='f8', flags=0, order='<'):
    """Pickle of a numpy type; flag 1 says that it holds Python objects."""
    args = write.tuple(write.text(code), b'\x89', b'\x88')
    items = [write.integer(3), write.text(order), b'N', b'N', b'N']
    items += [write.integer(i) for i in (-1, -1, flags)]
    return write.name('numpy dtype') + args + b'R' + write.tuple(*items) + b'b'


def empty_array(function='numpy.core.multiarray _reconstruct'):
    args = write.name('numpy ndarray'), write.tuple(write.integer(0)), write.raw(b'b')
    return write.name(function) + write.tuple(*args) + b'R'


def array_state(shape, dtype_pickle, raw):
    shape = write.tuple(*map(write.integer, shape))
    return write.tuple(write.integer(1), shape, dtype_pickle, b'\x89', write.raw(raw))


@needs_safe_loading
@needs_safe_loading
@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype='i2').reshape(2, 3)),
        np.arange(5000, dtype='>i4'),
        np.array([True, False, True]),
        np.zeros((0, 4), 'f2'),
        np.array(3.5 + 1j),
    ],
    ids=['float64', 'columns', 'big-endian', 'bool', 'empty', 'complex'],
)
def test_arrays_come_back(array):
    loaded = load(saved(array))
    assert isinstance(loaded, np.ndarray) and loaded.flags.writeable
    assert loaded.dtype == array.dtype.newbyteorder('=')
    assert loaded.flags.f_contiguous == array.flags.f_contiguous
    np.testing.assert_array_equal(loaded, array)
    np.testing.assert_array_equal(load(saved(loaded)), array)
    # Saved as what it stands for, for whoever has no mmela
    assert type(pickle.loads(pickle.dumps(loaded, 2))) is np.ndarray


@needs_safe_loading
@needs_safe_loading
def test_arguments_of_a_script():
    """A real Namespace again, which others can save and load."""
    arguments = argparse.Namespace(lr=0.1, arch='deit', layers=[1, 2], seed=None)
    loaded = load(saved(dict(args=arguments)))['args']
    assert type(loaded) is argparse.Namespace and loaded == arguments
    assert type(pickle.loads(pickle.dumps(loaded))) is argparse.Namespace
    assert load(saved(loaded)) == arguments


@needs_safe_loading
@pytest.mark.parametrize(
    'state',
    [
        write.tuple(),
        write.dict(__class__=write.integer(1)),
        write.dict(__setstate__=write.name('argparse Namespace')),
        b'}(' + write.integer(1) + write.integer(2) + b'u',
    ],
)
def test_damaged_arguments_of_a_script(state):
    new = write.name('argparse Namespace') + b')\x81'
    assert load(new + write.dict(lr=write.integer(1)) + b'b').lr == 1
    with pytest.raises(pickle.UnpicklingError, match='arguments of a script'):
        load(new + state + b'b')
    with pytest.raises(pickle.UnpicklingError):  # by its constructor
        load(write.name('argparse Namespace') + write.tuple() + b'R')
    with pytest.raises(pickle.UnpicklingError):  # a second time
        load(new + write.dict(lr=write.integer(1)) + b'b' + write.dict() + b'b')


@needs_safe_loading
def test_log_history_loads_safely():
    """What mmengine puts into each of its checkpoints."""
    buffer = HistoryBuffer()
    for value in (1.0, np.float64(2.0), 6):
        buffer.update(value)
    content = dict(buffer=buffer, scalar=np.float32(3), flag=np.bool_(True))
    loaded = load(saved(content))
    assert loaded['scalar'] == 3 and loaded['flag']
    for history in (loaded['buffer'], load(saved(loaded))['buffer']):
        assert type(history) is HistoryBuffer
        assert all(type(array) is np.ndarray for array in history.data)
        assert history.mean() == 3 and history.statistics('max') == 6
        history.update(7.0)
        assert copy.deepcopy(history).mean() == 4
    assert load(saved(HistoryBuffer())).data[0].shape == (0,)


@needs_safe_loading
@needs_safe_loading
@pytest.mark.parametrize('core', ['core', '_core'])
def test_files_of_both_versions_of_numpy(core):
    module = f'numpy.{core}.multiarray'
    raw = np.arange(3.0).tobytes()
    array = empty_array(f'{module} _reconstruct') + array_state((3,), dtype(), raw)
    assert load(array + b'b').tolist() == [0, 1, 2]
    args = write.tuple(dtype(), write.raw(np.float64(2.5).tobytes()))
    assert load(write.name(f'{module} scalar') + args + b'R') == 2.5


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@needs_safe_loading
@pytest.mark.parametrize(
    'evil',
    [
        Evil(getattr, HistoryBuffer, '__init__'),
        Evil(getattr, np.ndarray, 'tofile'),
        Evil(getattr, 'x', 'upper'),
        Evil(eval, '1'),
        Evil(print, 'executed'),
        Evil(bytes, 10**9),
        Evil(np.ndarray, (4,), 'O'),
        Evil(HistoryBuffer, [1], [1]),
    ],
    ids=['method', 'ndarray', 'str', 'eval', 'print', 'bytes', 'array', 'history'],
)
def test_other_code_is_refused(evil):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        load(saved(dict(x=evil)))


@needs_safe_loading
@pytest.mark.parametrize('code', ['O', 'V8', 'S8', 'U2', 'M8', 'f8,O'])
def test_only_types_of_numbers(code):
    with pytest.raises(pickle.UnpicklingError, match='is not allowed in a checkpoint'):
        load(write.name('numpy dtype') + write.tuple(write.text(code)) + b'R')


@needs_safe_loading
class TestMemory:
    """Files that made numpy take their bytes for pointers, or freed memory."""

    @pytest.mark.parametrize('flags', [1, 16, 27, 63])
    def test_numbers_do_not_become_objects(self, flags):
        state = array_state((1,), dtype(flags=flags), b'A' * 8)
        with pytest.raises(pickle.UnpicklingError, match='type .* damaged'):
            load(empty_array() + state + b'b')

    def test_memory_is_not_freed_while_a_tensor_has_it(self):
        array = empty_array() + array_state((4,), dtype('f4'), bytes(16)) + b'bq\0'
        tensor = write.name('torch._utils _rebuild_device_tensor_from_numpy')
        tensor += write.tuple(
            b'h\0', write.name('torch float32'), b'X\3\0\0\0cpu', b'\x89'
        )
        again = b'h\0' + array_state((1000,), dtype('f4'), bytes(4000)) + b'b'
        assert load(write.tuple(array, tensor + b'R'))[1].tolist() == [0] * 4
        with pytest.raises(pickle.UnpicklingError, match='array .* damaged'):
            load(write.tuple(array, tensor + b'R', again))

    @pytest.mark.parametrize(
        'shape, code, raw',
        [
            ((3,), 'f8', bytes(16)),
            ((2,), 'f8', bytes(15)),
            ((2**31 - 1, 2**31 - 1, 4), 'f8', b''),
            ((4,), 'b1', b'\0\1\2\1'),
        ],
        ids=['short', 'odd', 'overflow', 'bool'],
    )
    def test_shape_and_bytes_must_agree(self, shape, code, raw):
        order = '|' if code == 'b1' else '<'
        state = array_state(shape, dtype(code, order=order), raw)
        with pytest.raises(pickle.UnpicklingError, match='damaged'):
            load(empty_array() + state + b'b')


@needs_safe_loading
def test_a_file_cannot_change_other_histories():
    new = write.name('mmengine.logging.history_buffer HistoryBuffer') + b')\x81'
    lowest = write.name('builtins getattr')
    lowest += write.tuple(new[:-2], write.text('min')) + b'R'
    one = empty_array() + array_state((1,), dtype(), np.float64(5).tobytes()) + b'b'
    state = dict(
        max_length=write.integer(9),
        _log_history=one,
        _count_history=one,
        statistics_methods=write.dict(mean=lowest),
    )
    history = load(new + write.dict(**state) + b'b')
    assert history.mean() == history.statistics('mean') == 1
    assert HistoryBuffer([1, 3], [1, 1]).statistics('mean') == 2
    for key, value in [
        ('max_length', b'N'),
        ('max_length', write.integer(-1)),
        ('_log_history', write.tuple(write.integer(1))),
        ('_count_history', empty_array()),
        ('update', write.integer(1)),
    ]:
        damaged = write.dict(**{**state, key: value})
        with pytest.raises(pickle.UnpicklingError, match='history .* damaged'):
            load(new + damaged + b'b')


def run(code, *args):
    return subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-W', 'ignore', *code, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_safe_loading
def test_hostile_files(tmp_path):
    """Thousands of them in a process of their own: no crash, no call."""
    done = run(['-m', 'tests.helpers.checkpoint_fuzz'], 0, 1500)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == 1500
    assert outcomes['loaded'] > 100 and outcomes['UnpicklingError'] > 100


@needs_safe_loading
def test_beside_a_script_that_allows_the_real_classes(tmp_path):
    """As is often advised: what loads is right, and the rest is refused."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(dict(history=history, n=np.float64(3)), tmp_path / 'x.pth')
    code = """
import itertools, sys, torch, numpy as np, mmela
from pickle import UnpicklingError
from mmengine.logging import HistoryBuffer
allowed = torch.serialization.get_safe_globals()
torch.serialization.clear_safe_globals()
ours = {f[1]: f for f in allowed if isinstance(f, tuple)}
core = np.zeros(1).__reduce__()[0].__module__
names = ['numpy.ndarray', 'numpy.dtype', 'builtins.getattr']
names += [HistoryBuffer.__module__ + '.HistoryBuffer']
names += [core + '._reconstruct', core + '.scalar']
real = [np.ndarray, np.dtype, getattr, HistoryBuffer]
real += [np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]]
types = [type(np.dtype(code)) for code in ('float64', 'int64', 'bool')]
# Which of two of the same name is taken depends on chance.
for mix in itertools.product(*((ours[n], (r, n)) for n, r in zip(names, real))):
    torch.serialization.clear_safe_globals()
    rest = [f for f in allowed if not isinstance(f, tuple) or f[1] not in names]
    torch.serialization.add_safe_globals([*rest, *mix, *types])
    try:
        loaded = torch.load(sys.argv[1], weights_only=True)
    except (TypeError, UnpicklingError):  # numpy's own take numpy's own alone
        assert any(f is r for (f, _), r in zip(mix, real)), mix
        continue
    assert loaded['history'].mean() == 1.5 and loaded['n'] == 3, mix
    assert type(loaded['history']) is HistoryBuffer
"""
    done = run(['-c', code], tmp_path / 'x.pth')
    assert done.returncode == 0, done.stderr[-2000:]


class TestLoadCheckpoint:
    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip('safetensors.torch')
        path = tmp_path / 'x.safetensors'
        safetensors.save_file(dict(a=torch.arange(3)), path)
        content = load_checkpoint(path)
        assert content['state_dict']['a'].tolist() == [0, 1, 2]
        assert content['meta'] == {}
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(ValueError, match='x.safetensors is not a checkpoint or is'):
            load_checkpoint(path)

    def test_safetensors_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, 'safetensors', None)
        path = tmp_path / 'x.safetensors'
        path.touch()
        with pytest.raises(ImportError, match='pip install safetensors'):
            load_checkpoint(path)

    @needs_safe_loading
    def test_says_what_is_not_allowed(self, tmp_path):
        path = tmp_path / 'x.pth'
        torch.save(dict(x=Path), path)
        with pytest.raises(
            ValueError, match=r'x.pth holds pathlib\S*Path, which could'
        ):
            load_checkpoint(path)

    def test_damaged(self, tmp_path):
        path = tmp_path / 'x.pth'
        for content in (b'', b'text', saved(dict(a=torch.ones(9)))[:300]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match='x.pth is not a checkpoint'):
                load_checkpoint(path)
        with pytest.raises(FileNotFoundError):
            load_checkpoint(tmp_path / 'nowhere.pth')

    def test_old_torch_is_warned_about(self, tmp_path, monkeypatch):
        path = tmp_path / 'x.pth'
        torch.save(dict(x=Path), path)
        monkeypatch.setattr(checkpoints, '_LOADS_SAFELY', False)
        with pytest.warns(
            UserWarning, match='runs code .*x.pth may contain.*safetensors'
        ):
            assert load_checkpoint(path) == dict(x=Path)
