"""What every command-line tool owes: help, and errors in one clear line."""

import pickle
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmcv.ops', exc_type=ImportError)

from mmela_light import command as commands  # noqa: E402
from tests.helpers.networks import classifier, needs_grad_cam, save  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'tools'
TOOLS = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.rglob('*.py')
    if "__name__ == '__main__'" in path.read_text('utf-8')
)
# Arguments by tool, each file of which is missing in one of the tests. CONFIG
# and CHECKPOINT fit each other, OUT may be written.
FILES = {
    'analysis/cam.py': [['CONFIG', 'CHECKPOINT', 'IMAGE'],
                        ['CONFIG', 'CHECKPOINT', 'IMAGE', '--compare',
                         'CONFIG', 'CHECKPOINT']],
    'analysis/cost.py': [['CONFIG'], ['CONFIG', '--minus', 'CONFIG']],
    'analysis/layer_attention.py': [['CONFIG', 'CHECKPOINT', '--data',
                                     'IMAGE']],
    'analysis/pictures.py': [['WORK_DIR', 'OUT']],
    'analysis/report.py': [['WORK_DIR']],
    'benchmark/compare.py': [['--net', 'CONFIG']],
    'convert/export.py': [['CONFIG', 'CHECKPOINT', 'OUT']],
    'convert/prune.py': [['CONFIG', 'CHECKPOINT', 'OUT']],
    'convert/published.py': [['CHECKPOINT', 'OUT']],
    'convert/push.py': [['CONFIG', 'CHECKPOINT', 'ann/net', '--out', 'OUT']],
    'convert/slim.py': [['CONFIG', 'CHECKPOINT', 'OUT']],
    'dataset/cifar.py': [['ARCHIVE', 'OUT']],
    'dataset/make_lesions.py': [['convert', 'OUT', '--images', 'FOLDER',
                                 '--masks', 'FOLDER']],
    'demo.py': [['--cfg-options', 'data_root=FOLDER']],
    'study.py': [['STUDY', '--dry-run']],
    'infer.py': [['CONFIG', 'CHECKPOINT', 'FOLDER', '--out', 'OUT']],
    'test.py': [['CONFIG', 'CHECKPOINT']],
    'train.py': [['CONFIG']],
}  # yapf: disable
# Tools that read no file that a user names
NO_FILES = {
    'analysis/coverage.py',
    'analysis/mmcv_operators.py',
    'analysis/model_zoo.py',
    'benchmark/hook_overhead.py',
    'dataset/make_shapes.py',
    'operators.py',
}
MISSING = [
    (tool, arguments, index)
    for tool, usages in FILES.items()
    for arguments in usages
    for index, name in enumerate(arguments)
    if name.rpartition('=')[2].isupper() and name != 'OUT'
]
# Tools that load a checkpoint by a config, and what follows the two
NETWORKS = {
    'analysis/cam.py': ['IMAGE'],
    'analysis/layer_attention.py': ['--data', 'IMAGE'],
    'convert/export.py': ['OUT'],
    'convert/prune.py': ['OUT'],
    'convert/push.py': ['ann/net', '--out', 'OUT'],
    'convert/slim.py': ['OUT'],
}
# What a network without layer attention is of no use for
NEED_ATTENTION = [
    'analysis/layer_attention.py',
    'convert/prune.py',
    'convert/push.py',
    'convert/slim.py',
]


def command_of(tool):
    """The command whose code a script is, or which it imports; None if none is."""
    text = (FOLDER / tool).read_text('utf-8')
    imported = re.search(r'^from (mmela\.\w+\.\w+) import main$', text, re.MULTILINE)
    file = f'{imported[1].replace(".", "/")}.py' if imported else f'tools/{tool}'
    return {file: name for name, file in commands.TOOLS.items()}.get(file)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """By placeholder, a path that there is and that tools accept."""
    folder = tmp_path_factory.mktemp('files')
    config, checkpoint = save(folder, 'narrow', classifier())
    (folder / 'image.jpg').write_text('no image')
    return dict(
        CONFIG=config,
        CHECKPOINT=checkpoint,
        IMAGE=folder / 'image.jpg',
        STUDY=ROOT / 'configs' / 'studies' / 'paper_kcla_table5.yml',
        WORK_DIR=folder,
        FOLDER=folder,
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tool as ``python tools/TOOL ARGUMENTS...`` does, in-process.

    Any exception but SystemExit, which a user would see as a traceback, fails
    the test.
    """

    def run(tool, *arguments):
        path = FOLDER / tool
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            runpy.run_path(str(path), run_name='__main__')
        printed = capsys.readouterr()
        code = error.value.code
        if isinstance(code, str):  # the interpreter prints it and exits by 1
            return 1, printed.out, printed.err + code + '\n'
        return code or 0, printed.out, printed.err

    return run


def check_error(result, *names):
    """One line that starts with 'error: ' and names what is wrong."""
    code, _, printed = result
    # Warnings of libraries are theirs.
    lines = [x for x in printed.splitlines() if x.startswith('error: ')]
    assert code == 1 and len(lines) == 1, printed
    assert printed.rstrip().endswith(lines[0]), printed
    assert 'Traceback' not in printed
    for name in names:
        assert str(name) in lines[0]
    assert 20 < len(lines[0]) < 500, lines[0]


def test_every_tool_is_here():
    assert set(FILES) | NO_FILES == set(TOOLS), (
        'say in FILES or NO_FILES which files a tool reads'
    )


@pytest.mark.parametrize('tool', TOOLS)
def test_help(run, tool):
    code, text, _ = run(tool, '--help')
    assert code == 0
    lines = text.splitlines()
    # argparse titles nothing so; the docstrings do.
    starts = [i for i, x in enumerate(lines) if x in ('Example:', 'Examples:')]
    assert len(starts) == 1, text
    example = []
    for line in lines[starts[0] + 1 :]:
        if not line.startswith(' '):
            break
        example.append(line)
    name = command_of(tool)
    command = f'python tools/{tool} '
    if name:  # however it is run
        command = f'mmela {name} '
        assert f'usage: {command}' in text
        assert 'tools/' not in text.replace("toolbox's own tools/", '')
    assert any(command in f'{line} ' for line in example), text
    # Broken where the source breaks it, with a backslash that can be pasted
    assert max(map(len, example)) <= 79, example
    assert not any(re.search(r'\S {5,}[^#\s]', x) for x in example), example


@pytest.mark.parametrize('tool', [t for t in FILES if t != 'demo.py'])
def test_without_arguments(run, tool):
    """What is required is said; nothing else happens."""
    if not any(a.isupper() and a != 'OUT' for a in FILES[tool][0][:1]):
        pytest.skip('no argument is required')
    code, out, err = run(tool)
    assert code == 2
    assert 'usage:' in out + err and 'Traceback' not in out + err


@pytest.mark.parametrize('tool, arguments, index', MISSING)
def test_missing_file(run, files, tmp_path, tool, arguments, index):
    if tool == 'analysis/cam.py':
        needs_grad_cam()
    nowhere = tmp_path / 'nowhere.x'
    filled = []
    for i, name in enumerate(arguments):
        option, equals, place = name.rpartition('=')
        path = nowhere if i == index else files.get(place, place)
        if place == 'OUT':
            path = tmp_path / 'out.pt2'
        filled.append(f'{option}{equals}{path}')
    check_error(run(tool, *filled), nowhere)
    assert not (tmp_path / 'out.pt2').exists()


def network_arguments(tool, files, out):
    return [out if name == 'OUT' else files.get(name, name) for name in NETWORKS[tool]]


@pytest.mark.parametrize('tool', NETWORKS)
@pytest.mark.parametrize('kind', ['shapes', 'keys', 'text', 'objects', 'list'])
def test_checkpoint_of_another_network(run, files, tmp_path, tool, kind):
    if tool == 'analysis/cam.py':
        needs_grad_cam()
    state = torch.load(files['CHECKPOINT'], weights_only=True)['state_dict']
    path = tmp_path / 'other.pth'
    if kind == 'shapes':
        wide = {
            k: v.repeat(2, *[1] * (v.dim() - 1)) if v.dim() else v
            for k, v in state.items()
        }
        torch.save(dict(state_dict=wide), path)
    elif kind == 'keys':  # still a backbone with layer attention
        deeper = dict(state)
        deeper['backbone.layer1.7.layer_attn.state'] = torch.tensor(0)
        deeper['backbone.layer1.7.conv1.weight'] = torch.zeros(1)
        del deeper['backbone.layer2.0.conv1.weight']
        torch.save(dict(state_dict=deeper), path)
    elif kind == 'text':
        path.write_text('no checkpoint')
    elif kind == 'objects':
        path.write_bytes(pickle.dumps(dict(state_dict=dict(a=Path()))))
    else:
        torch.save([torch.zeros(1)], path)
    out = tmp_path / 'out.pt2'
    check_error(
        run(tool, files['CONFIG'], path, *network_arguments(tool, files, out)), path
    )
    assert not out.exists()


@pytest.mark.parametrize('tool', NEED_ATTENTION)
def test_network_without_layer_attention(run, files, tmp_path, tool):
    plain = classifier()
    plain['model']['backbone'] = dict(type='ResNet', depth=18)
    plain['model']['head']['in_channels'] = 512
    config, checkpoint = save(tmp_path, 'plain', plain)
    out = tmp_path / 'out.pt2'
    code, _, printed = result = run(
        tool, config, checkpoint, *network_arguments(tool, files, out)
    )
    check_error(result, 'plain', 'layer attention')
    assert not out.exists()


@pytest.mark.parametrize('tool', NETWORKS)
def test_no_config(run, files, tmp_path, tool):
    """A file that is no config, and one without a model."""
    if tool == 'analysis/cam.py':
        needs_grad_cam()
    out = tmp_path / 'out.pt2'
    for name, text in (
        ('empty.py', 'a = 1\n'),
        ('broken.py', 'a = (\n'),
        ('notes.txt', 'a = 1\n'),
    ):
        path = tmp_path / name
        path.write_text(text)
        check_error(
            run(tool, path, files['CHECKPOINT'], *network_arguments(tool, files, out)),
            path,
        )
        assert not out.exists()


@pytest.mark.parametrize('missing', ['onnx', 'onnxscript'])
def test_export_checks_its_packages_first(run, tmp_path, monkeypatch, missing):
    """Before it reads a file: none of these is there."""
    monkeypatch.setattr(
        'mmela.convert.export.find_spec', lambda name: name != missing or None
    )
    out = tmp_path / 'x.onnx'
    check_error(
        run('convert/export.py', 'no.py', 'no.pth', out), missing, 'mmela[export]'
    )
    check_error(run('convert/export.py', 'no.py', 'no.pth', 'x.pth'), 'x.pth')


def test_published_has_all_choices():
    """Written down twice, as the parser must not import torch."""
    from mmela.convert import published

    tool = runpy.run_path(str(FOLDER / 'convert' / 'published.py'))
    assert tool['ARCHS'] == published.ARCHS
    assert tool['TARGETS'] == tuple(published.TARGETS)


def test_model_zoo_of_an_unknown_folder(run):
    check_error(run('analysis/model_zoo.py', 'nowhere'), 'nowhere')


def test_shapes_over_something_else(run, files):
    check_error(run('dataset/make_shapes.py', files['FOLDER']), files['FOLDER'])


@pytest.mark.parametrize('tool', ['benchmark/compare.py', 'benchmark/hook_overhead.py'])
def test_benchmark_on_an_unknown_device(run, tool):
    check_error(run(tool, '--device', 'abacus'), 'abacus')
