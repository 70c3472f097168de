"""Thousands of hostile checkpoints, for a separate process.

Each file is a random, wrong combination of the parts that numpy, mmengine and torch
write, or a real checkpoint with damaged bytes. It is loaded like a user's checkpoint,
and the result is used. The process must end normally, and may only call functions
that read checkpoints.

A test runs this; for larger counts, run:
  python -m tests.helpers.checkpoint_fuzz SEED COUNT
"""

import copy
import gc
import io
import json
import random
import struct
import sys
import warnings
import zipfile
from collections import Counter

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub

import mmela  # noqa: F401

CORE = 'numpy.core.multiarray', 'numpy._core.multiarray'
RECONSTRUCT, SCALAR = f'{CORE[0]} _reconstruct', f'{CORE[0]} scalar'
HISTORY = 'mmengine.logging.history_buffer HistoryBuffer'
GLOBALS = [
    'numpy ndarray',
    'numpy dtype',
    *(f'{core} {name}' for core in CORE for name in ('_reconstruct', 'scalar')),
    HISTORY,
    'builtins getattr',
    'builtins bytes',
    'argparse Namespace',
    'mmela.compat.checkpoints SavedArguments',
    'mmela.compat.checkpoints SavedArray',
    'mmela.compat.checkpoints SavedDtype',
    'mmela.compat.checkpoints SavedHistory',
    # torch's functions that take arrays or any object
    'torch Tensor',
    'torch.nn.parameter Parameter',
    'torch._utils _rebuild_device_tensor_from_numpy',
    'torch._utils _rebuild_parameter',
    'torch._utils _rebuild_parameter_with_state',
    'torch._tensor _rebuild_from_type_v2',
    'collections OrderedDict',
    'builtins set',
    # never allowed to run
    'os system',
    'builtins eval',
    'builtins print',
    'numpy fromfile',
    'numpy.dtypes Float64DType',
    'mmengine.logging.message_hub MessageHub',
]
CODES = 'b1 i1 i2 i4 i8 u1 u8 f2 f4 f8 c8 c16 O O8 V8 S3 U2 M8 m8 f16 i3 >f8'.split()
INTEGERS = [0, 1, 2, 3, 4, 7, 8, 63, 255, 1000, 2**31 - 1, -1, -8, -(2**31)]
STATISTICS = ['min', 'max', 'current', 'mean', '__init__', '__class__', '_x', 'update']


def random_bytes(rng: random.Random, count: int) -> bytes:
    """``randbytes``, which Python lacks before 3.9."""
    return bytes(rng.getrandbits(8) for _ in range(count))


class Writer:
    """Writes one random pickle, protocol 2, for torch's restricted reader.

    Args:
        rng (random.Random): Random generator.
        chaos (float): Probability of replacing a part with any other part.
    """

    def __init__(self, rng: random.Random, chaos: float) -> None:
        self.rng, self.chaos, self.memos = rng, chaos, 0

    def pickle(self) -> bytes:
        parts = [self.any(3) for _ in range(self.rng.randint(1, 4))]
        return b'\x80\x02(' + b''.join(parts) + b't.'

    # Plain values

    def integer(self, value: int) -> bytes:
        if -(2**31) <= value < 2**31:
            return b'J' + struct.pack('<i', value)
        data = value.to_bytes(9, 'little', signed=True)
        return b'\x8a' + bytes([len(data)]) + data

    def text(self, value: str) -> bytes:
        data = value.encode()
        return b'X' + struct.pack('<I', len(data)) + data

    def raw(self, value: bytes) -> bytes:
        text = self.text(value.decode('latin1'))
        return b'c_codecs\nencode\n' + self.tuple(text, self.text('latin1')) + b'R'

    def tuple(self, *items: bytes) -> bytes:
        return b'(' + b''.join(items) + b't'

    def dict(self, **items: bytes) -> bytes:
        pairs = b''.join(self.text(key) + value for key, value in items.items())
        return b'}(' + pairs + b'u'

    def name(self, name: str) -> bytes:
        return b'c' + name.replace(' ', '\n').encode() + b'\n'

    def boolean(self, value: bool) -> bytes:
        return b'\x88' if value else b'\x89'

    def atom(self) -> bytes:
        rng = self.rng
        choice = rng.randrange(10)
        if choice == 0 and self.memos:
            return b'h' + bytes([rng.randrange(self.memos)])
        if choice == 1:
            return self.text(rng.choice(CODES + STATISTICS + ['<', '>', '|', '=']))
        if choice == 2:
            return self.raw(random_bytes(rng, rng.choice(INTEGERS[:10])))
        if choice == 3:
            return b'G' + struct.pack('>d', rng.choice([0.0, 1.5, 1e300, float('nan')]))
        if choice == 4 and self.chaos:
            return self.name(rng.choice(GLOBALS))
        if choice == 5:
            return rng.choice([b'N', b'\x88', b'\x89', b')', b']', b'}', b'\x8f'])
        return self.integer(rng.choice(INTEGERS + [2**62, 2**63, -(2**63)]))

    # Parts of a checkpoint. A part may become anything, and be reused.

    def part(self, usual: bytes, depth: int) -> bytes:
        return self.any(depth - 1) if self.rng.random() < self.chaos else usual

    def keep(self, value: bytes) -> bytes:
        if self.memos < 250 and self.rng.random() < 0.5:
            value += b'q' + bytes([self.memos])
            self.memos += 1
        return value

    def build(self, value: bytes, state: bytes) -> bytes:
        """Write BUILD once, never, or twice with different states."""
        times = 1 if self.rng.random() > self.chaos else self.rng.randrange(4)
        for _ in range(times):
            value = self.keep(value) + state + b'b'
        return value

    def reduce(self, depth: int, function: str, *args: bytes) -> bytes:
        function = self.part(self.name(function), depth)
        args = self.part(self.tuple(*(self.part(a, depth) for a in args)), depth)
        return function + args + (b'R' if self.rng.random() >= self.chaos else b'\x81')

    def any(self, depth: int) -> bytes:
        rng = self.rng
        if depth <= 0:
            return self.atom()
        makers = [self.dtype, self.scalar, self.array, self.history, self.statistic]
        makers += [self.container, self.tensor]
        makers += [self.chaotic] if rng.random() < 4 * self.chaos else []
        return self.keep(rng.choice(makers)(depth))

    def dtype(self, depth: int, code: str = None) -> bytes:
        bad = self.rng.random() < self.chaos
        code = self.rng.choice(CODES) if bad else code or self.rng.choice(CODES[:12])
        args = self.text(code), self.boolean(False), self.boolean(True)
        order = '|' if code.endswith('1') else '<'
        state = [self.integer(3), self.text(order), b'N', b'N', b'N']
        state += [self.integer(-1), self.integer(-1), self.integer(0)]
        if self.rng.random() < 4 * self.chaos:  # flags, such as the one of objects
            state[7] = self.integer(self.rng.choice([1, 2, 8, 16, 27, 63, 127]))
            state[5] = self.integer(self.rng.choice([-1, *INTEGERS]))
        state = self.tuple(*(self.part(item, depth) for item in state))
        return self.build(self.reduce(depth, 'numpy dtype', *args), state)

    def numbers(self, code: str, count: int) -> bytes:
        size = int(''.join(filter(str.isdigit, code)) or 8)
        if self.rng.random() < self.chaos:
            size += 1
        return self.raw(random_bytes(self.rng, size * count))

    def scalar(self, depth: int) -> bytes:
        code = self.rng.choice(CODES[:12])
        dtype = self.dtype(depth - 1, code)
        return self.reduce(depth, SCALAR, dtype, self.numbers(code, 1))

    def array(self, depth: int, code: str = None, count: int = None) -> bytes:
        code = code or self.rng.choice(CODES[:12])
        count = self.rng.randrange(5) if count is None else count
        args = self.name('numpy ndarray'), self.tuple(self.integer(0)), self.raw(b'b')
        array = self.reduce(depth, RECONSTRUCT, *args)
        shape = self.tuple(self.part(self.integer(count), depth))
        state = [self.integer(1), shape, self.dtype(depth - 1, code)]
        state += [self.boolean(False), self.numbers(code, count)]
        state = self.tuple(*(self.part(item, depth) for item in state))
        return self.build(array, state)

    def history(self, depth: int) -> bytes:
        count = self.rng.randrange(4)
        state = dict(
            max_length=self.part(self.integer(1000), depth),
            _log_history=self.part(self.array(depth - 1, 'f8', count), depth),
            _count_history=self.part(self.array(depth - 1, 'i8', count), depth),
            statistics_methods=self.part(
                self.dict(**{self.rng.choice(STATISTICS): self.statistic(depth)}), depth
            ),
        )
        if self.rng.random() < self.chaos:
            state.pop(self.rng.choice(list(state)))
        new = self.name(HISTORY) + self.part(b')', depth) + b'\x81'
        return self.build(new, self.part(self.dict(**state), depth))

    def statistic(self, depth: int) -> bytes:
        name = self.text(self.rng.choice(STATISTICS[:4]))
        return self.reduce(depth, 'builtins getattr', self.name(HISTORY), name)

    def container(self, depth: int) -> bytes:
        items = [self.any(depth - 1) for _ in range(self.rng.randrange(4))]
        if self.rng.random() < 0.5:
            return self.tuple(*items)
        return self.dict(**{str(i): item for i, item in enumerate(items)})

    def tensor(self, depth: int) -> bytes:
        """Write a tensor that shares an array's memory, or a tensor from storage."""
        if self.rng.random() < 0.5:
            name = 'torch._utils _rebuild_device_tensor_from_numpy'
            dtype, device = self.name('torch float32'), self.text('cpu')
            array = self.part(self.array(depth - 1, 'f4'), depth)
            return self.reduce(depth, name, array, dtype, device, self.boolean(False))
        storage = self.tuple(
            *(self.text('storage'), self.name('torch FloatStorage')),
            *(self.text('0'), self.text('cpu'), self.integer(4)),
        )
        args = self.integer(0), self.tuple(self.integer(4)), self.tuple(self.integer(1))
        hooks = self.name('collections OrderedDict') + b')R'
        name = 'torch._utils _rebuild_tensor_v2'
        storage += b'Q'
        return self.reduce(depth, name, storage, *args, self.boolean(False), hooks)

    def chaotic(self, depth: int) -> bytes:
        args = [self.any(depth - 1) for _ in range(self.rng.randrange(5))]
        value = self.reduce(depth, self.rng.choice(GLOBALS), *args)
        return self.build(value, self.any(depth - 1))


def archive(pickle: bytes) -> bytes:
    """Put a pickle into torch's file format, with one storage of four floats."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as zipped:
        zipped.writestr('archive/data.pkl', pickle)
        zipped.writestr('archive/byteorder', 'little')
        zipped.writestr('archive/data/0', bytes(16))
        zipped.writestr('archive/version', '3\n')
    return file.getvalue()


def real_checkpoint() -> bytes:
    """Write a small checkpoint with mmengine."""
    history = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 2])
    file = io.BytesIO()
    torch.save(
        dict(
            meta=dict(
                epoch=1, best=np.float64(0.5), palette=np.arange(6).reshape(2, 3)
            ),
            message_hub=dict(
                log_scalars={'train/loss': history},
                runtime_info=dict(epoch=1, flag=np.bool_(True)),
                resumed_keys={'train/loss': True},
            ),
            state_dict=dict(weight=torch.ones(2, 2)),
        ),
        file,
    )
    return file.getvalue()


def damage(rng: random.Random, content: bytes) -> bytes:
    """Change, cut out, repeat or drop bytes."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(len(content) + 1)
        other = rng.randrange(len(content) + 1)
        length = rng.randrange(1, 12)
        choice = rng.randrange(4)
        if choice == 0:
            content[place : place + 1] = random_bytes(rng, 1)
        elif choice == 1:
            del content[place : place + length]
        elif choice == 2:
            content[place:place] = content[other : other + length]
        else:
            content[place : place + length] = content[other : other + length]
    return bytes(
        content[: rng.randrange(len(content))] if rng.random() < 0.1 else content
    )


def use(value) -> None:
    """Use the loaded object like a run does."""
    copied = copy.deepcopy(value)
    repr(value), str(copied)
    torch.save(value, io.BytesIO())
    if isinstance(value, (np.ndarray, np.generic)):
        value.sum(), np.sort(value, None), np.nonzero(value), np.asarray(value).tolist()
    elif isinstance(value, torch.Tensor):
        value.sum(), value.clone(), value.tolist()
    elif isinstance(value, HistoryBuffer):
        value.update(1.0)
        value.mean(), value.statistics('min'), value.statistics('mean', 2)
    elif isinstance(value, dict):
        if 'message_hub' in value:
            hub = MessageHub('fuzz')
            hub.load_state_dict(value['message_hub'])
            use(hub.state_dict())
    if isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            attempt(use, item)


def attempt(function, *args):
    """Call a function; an error is not a crash."""
    try:
        return function(*args)
    except Exception as error:
        return error


def main(seed: int, count: int) -> None:
    calls = []
    harmless = 'os.listdir', 'os.scandir', 'os.putenv'

    def audit(event: str, args: tuple) -> None:
        if event.split('.')[0] in ('os', 'subprocess', 'socket', 'shutil', 'ctypes'):
            if event not in harmless:
                calls.append(event)
        elif event == 'open' and isinstance(args[1], str) and args[1].strip('rbt'):
            calls.append(f'open {args[:2]}')

    real = real_checkpoint()
    with zipfile.ZipFile(io.BytesIO(real)) as zipped:
        (name,) = (n for n in zipped.namelist() if n.endswith('/data.pkl'))
        real_pickle = zipped.read(name)
    for content in (
        real,
        archive(b'\x80\x02' + Writer(random, 0).array(3, 'f8') + b'.'),
    ):
        use(
            torch.load(io.BytesIO(content), weights_only=True)
        )  # first load imports everything needed
    statistics = dict(HistoryBuffer._statistics_methods)

    outcomes: Counter = Counter()
    warnings.simplefilter('ignore')
    np.seterr(all='ignore')
    sys.addaudithook(audit)
    for case in range(count):
        rng = random.Random(f'{seed}-{case}')
        kind = case % 4
        if kind == 3:
            content = damage(rng, real)
        elif kind == 2:
            content = archive(damage(rng, real_pickle))
        else:
            content = archive(
                Writer(rng, rng.choice([0.005, 0.02, 0.05, 0.2])).pickle()
            )
        if len(sys.argv) > 3:  # keeps the last case after a crash
            with open(sys.argv[3], 'wb', buffering=0) as file:
                file.write(content)
            calls.clear()
        try:
            loaded = torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes['loaded'] += 1
            attempt(use, loaded)
            del loaded
        if case % 100 == 0:
            gc.collect()
        if HistoryBuffer._statistics_methods != statistics:
            calls.append('changed statistics')
        if calls:
            raise SystemExit(f'case {seed}-{case} called {calls}')
    gc.collect()
    print(json.dumps(dict(outcomes)))


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]))
