"""Nothing on disk is lost or half written, whoever writes and however it ends."""

import ast
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmela.analysis.attention import save_measurement
from mmela.analysis.report import make_report
from mmela.convert.export import export_backbone
from mmela.convert.slim import SlimNetwork
from mmela.files import NotWritten, replacing, write_text
from mmela.pruning import PruningReport
from mmela.pruning.record import keep_earlier
from mmela.studies.page import write_page
from mmela.studies.results import collect, write_tables
from mmela.studies.run import Record
from mmela.visualization import drawing
from mmela.visualization.drawing import draw, draw_over_image
from tests.helpers.studies import tiny_jobs
from tests.helpers.work_dirs import make_work_dir

ROOT = Path(__file__).resolve().parents[1]


def slim(folder, suffix='.pth'):
    network = SlimNetwork(Config(dict(a=1)), weights(), {}, {}, {}, 1)
    network.save(folder / f'slim{suffix}', folder / 'slim.py')


def weights():
    return {'a': torch.rand(2000)}


def study(folder):
    study, jobs = tiny_jobs(folder.parent, out=folder)
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        job.write(Record(settings={'a': os.getpid()}))
    runs, layers = collect(study, jobs)
    write_tables(runs, layers, folder / 'tiny.csv')
    write_page(study, jobs, runs, layers, [], folder / 'tiny.md', f'a {os.getpid()}')


def noise(shape):
    return np.frombuffer(os.urandom(int(np.prod(shape))), np.uint8).reshape(shape)


def maps(folder):
    image, values = noise((20, 30, 3)) / 255, noise((20, 30)) / 255
    draw_over_image(folder / 'a.png', image, {'n': {'m': values}}, {'n': {}}, 't')


WRITERS = dict(
    text=lambda folder: write_text(folder / 'a.txt', str(os.getpid()) * 1000),
    report_of_the_hook=lambda folder: PruningReport(
        dict(windows=[], policy={'pid': os.getpid()})
    ).write(folder / 'pruning.json'),
    slim=slim,
    safetensors=lambda folder: slim(folder, '.safetensors'),
    study=study,
    picture=lambda folder: draw(None, folder / 'a.png'),
    maps=maps,
    measurement=lambda folder: save_measurement(
        folder, 'a.py', 'a.pth', 'images', {'values': [os.getpid()] * 500}
    ),
    page=make_report,
    torchscript=lambda folder: export_backbone(nn.Conv2d(3, 9, 3), folder / 'a.pt'),
)


def files(folder):
    """What a user sees: path and content."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
        and not any(x.startswith('.') for x in path.relative_to(folder).parts)
    }


def full_disk(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed(number):
    """Have the process die where it would rename its file of this number."""
    replace, count = os.replace, iter(range(number))

    def kill(*args):
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = kill


def attempt(writer, folder, *disturbances):
    """Write in a process of its own; its exit code."""

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for disturb, value in disturbances:
            disturb(value)
        WRITERS[writer](folder)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='limits of a forked process')
@pytest.mark.parametrize('writer', WRITERS)
def test_every_writer(writer, tmp_path, monkeypatch):
    """On a full disk, and killed at each rename."""
    folder = tmp_path / 'out'
    folder.mkdir()
    # What takes long and writes nothing
    monkeypatch.setattr(drawing, 'render', lambda plot, theme: noise((40, 40, 3)))
    if writer == 'page':
        make_work_dir(folder)
    before = files(folder)
    # Where nothing was, nothing whole or half is left.
    assert attempt(writer, folder, (full_disk, 10)) != 0
    assert files(folder) == before
    assert attempt(writer, folder) == 0
    before = files(folder)
    assert before
    for size in (10, max(map(len, before.values())) // 2):
        assert attempt(writer, folder, (full_disk, size)) != 0
        for path, content in files(folder).items():
            # Smaller files than the limit may be new, and then whole
            assert content == before[path] or 0 < len(content) <= size
    for number in (0, 1, 2, 1000):  # of a page with its pictures the first
        before = files(folder)
        code = attempt(writer, folder, (killed, number))
        after = files(folder)
        assert set(after) == set(before)
        changed = [path for path in after if after[path] != before[path]]
        assert len(changed) <= number
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0


def test_what_belongs_together(tmp_path):
    """A config that cannot be written takes the checkpoint with it."""
    network = SlimNetwork(Config(dict(a=1)), weights(), {}, {}, {}, 1)
    (tmp_path / 'slim.py').mkdir()
    with pytest.raises(NotWritten, match='slim.py cannot be written: it is a folder'):
        network.save(tmp_path / 'slim.pth', tmp_path / 'slim.py')
    assert os.listdir(tmp_path) == ['slim.py']
    network.save(tmp_path / 'slim.pth', tmp_path / 'new' / 'folder' / 'slim.py')
    assert (tmp_path / 'new' / 'folder' / 'slim.py').is_file()


def test_links_modes_and_devices(tmp_path):
    real = tmp_path / 'real.txt'
    real.write_text('old')
    real.chmod(0o640)
    (tmp_path / 'link.txt').symlink_to(real)
    write_text(tmp_path / 'link.txt', 'new')
    assert (tmp_path / 'link.txt').is_symlink() and real.read_text() == 'new'
    assert real.stat().st_mode & 0o777 == 0o640
    write_text(os.devnull, 'text')
    assert not Path(os.devnull).is_file()
    with pytest.raises(NotWritten, match='no folder'):
        write_text(tmp_path / 'none' / 'a.txt', '')
    with pytest.raises(ZeroDivisionError), replacing(real) as temporary:
        temporary.write_text('half')
        raise ZeroDivisionError
    assert real.read_text() == 'new'
    assert sorted(os.listdir(tmp_path)) == ['link.txt', 'real.txt']


def test_reports_of_one_second_are_kept(tmp_path):
    path = tmp_path / 'pruning.json'
    for number in range(3):
        path.write_text(str(number))
        os.utime(path, (1e9, 1e9))
        keep_earlier(path)
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ['0', '1', '2']


# -- all writers in the code -----------------------------------------------------

# Attributes and functions that write a file; the argument that names it is checked
WRITES = {
    'write_text', 'write_bytes', 'imwrite', 'savefig', 'print_png', 'savez',
    'savez_compressed', 'save', 'save_file', 'dump', 'to_csv', 'VideoWriter', 'open',
}  # yapf: disable
# What is neither a result nor to be lost
EXCEPT = {
    'mmela/studies/train.py': 'a log, which grows',
    'mmela/compat/loaders.py': 'write_safetensors, which is given where to write',
    'mmela/convert/hub.py': 'SlimNetwork.save, which does',
    'tools/convert/slim.py': 'SlimNetwork.save, which does',
    'mmela/command_line.py': 'what it keeps from being overwritten',
    'mmela/tools/shapes.py': 'data sets, whose folder is renamed at the end',
}


def writing_calls(tree):
    """Calls that write, each with the names in it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        if name not in WRITES:
            continue
        if name == 'open':
            modes = [*node.args, *(k.value for k in node.keywords)]
            modes = [m.value for m in modes if isinstance(m, ast.Constant)]
            if not any(isinstance(m, str) and set(m) & set('wax') for m in modes):
                continue
            if not any(isinstance(m, str) and len(m) <= 3 for m in modes):
                continue
        if name == 'write_text' and isinstance(node.func, ast.Name):
            continue  # that of mmela.files
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        yield node.lineno, name, names


def test_all_files_are_written_beside_and_renamed():
    faults = []
    for path in [*ROOT.glob('mmela/**/*.py'), *ROOT.glob('tools/**/*.py')]:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(tuple(EXCEPT)) or '.mim' in name:
            continue
        tree = ast.parse(path.read_text('utf-8'))
        beside = {
            item.optional_vars.id
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
            if isinstance(item.context_expr, ast.Call)
            and getattr(item.context_expr.func, 'id', '') == 'replacing'
        }
        for line, call, names in writing_calls(tree):
            if not names & (beside | {'temporary'}):
                faults.append(f'{name}:{line}: {call}')
    assert not faults, faults


@pytest.mark.parametrize('name', ['slim.pth', 'slim.py'])
def test_the_file_that_cannot_be_written_is_named(name, tmp_path, monkeypatch):
    """Of two that belong together the right one, and neither is left."""

    def fail(*args):
        raise OSError('no space left')

    writer = (torch, 'save') if name == 'slim.pth' else (Config, 'dump')
    monkeypatch.setattr(*writer, fail)
    with pytest.raises(NotWritten, match=f'{tmp_path / name} cannot be written: no sp'):
        slim(tmp_path)
    assert not list(tmp_path.iterdir())
