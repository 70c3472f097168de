import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmela.command_line import (
    _configs_kept,
    channels_last,
    find_config,
    find_tool,
    run_tool,
)
from mmela_light.arguments import show_usage


def test_finds_the_tool_of_the_configs_toolbox(config_dir):
    mmdet = pytest.importorskip('mmdet')
    config = next((config_dir / 'faster_rcnn').glob('*r50*.py'))
    tool = find_tool(str(config), 'train.py')
    assert tool.is_file() and str(tool).startswith(mmdet.__path__[0])


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no config nowhere.py'):
        find_tool('nowhere.py', 'train.py')
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'no_such_toolbox'")
    with pytest.raises(ValueError, match="'no_such_toolbox'"):
        find_tool(str(config), 'train.py')
    with pytest.raises(SystemExit, match='error: there is no config nowhere.py'):
        run_tool('train.py', ['nowhere.py'])


def test_config_that_a_toolbox_ships():
    pytest.importorskip('mmpretrain')
    name = 'resnet/resnet18_8xb16_cifar10.py'
    path = find_config(f'mmpretrain::{name}')
    assert path.is_file() and path.match(f'.mim/configs/{name}')
    assert find_tool(f'mmpretrain::{name}', 'train.py').name == 'train.py'
    with pytest.raises(FileNotFoundError, match='there is no config .*/nothing.py'):
        find_config('mmpretrain::nothing.py')
    with pytest.raises(ValueError, match="'mmnothing' is not an installed toolbox"):
        find_config('mmnothing::resnet.py')


@pytest.mark.parametrize('argv, code', [([], 2), (['--help'], 0)])
def test_usage(argv, code, capsys):
    with pytest.raises(SystemExit) as error:
        show_usage(argv, 'usage: ...')
    assert error.value.code == code
    assert 'usage: ...' in capsys.readouterr().out


def test_folder_named_like_a_toolbox(tmp_path, monkeypatch):
    """A clone of its repository on the path is no installed package."""
    (tmp_path / 'toolbox').mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'toolbox'\n")
    with pytest.raises(
        ValueError, match="'toolbox', which is not an installed toolbox"
    ):
        find_tool(str(config), 'train.py')


def test_channels_last_joins_the_other_settings():
    setting = 'default_hooks.memory_format.type=MemoryFormatHook'
    assert channels_last(['--amp']) == ['--amp']
    assert channels_last(['a.pth', '--channels-last', '--amp']) == [
        *('a.pth', '--amp', '--cfg-options', setting)
    ]
    assert channels_last(['--cfg-options', 'x=1', '--channels-last']) == [
        *('--cfg-options', setting, 'x=1')
    ]


@pytest.mark.parametrize(
    'tests, same, kept',
    [(True, True, True), (True, False, True), (False, True, True),
     (False, False, False)],
)  # fmt: skip
def test_configs_of_runs_are_kept(tmp_path, tests, same, kept):
    """The config of a run, given to a tool, and that of a run that is tested."""
    dump = Runner.dump_config
    run, mine = tmp_path / 'run', tmp_path / 'mine'
    for folder in (run, mine):
        folder.mkdir()
        (folder / 'my.py').write_text('a = 1  # mine\n')
    runner = Runner.__new__(Runner)
    runner._work_dir = str(run)
    runner.cfg = Config.fromfile((run if same else mine) / 'my.py')
    runner.cfg.a = 2
    with _configs_kept(tests):
        runner.dump_config()
        assert ((run / 'my.py').read_text() == 'a = 1  # mine\n') == kept
        (run / 'my.py').unlink()
        runner.dump_config()
    # What follows in this process is not kept from writing.
    assert Runner.dump_config is dump
    assert Config.fromfile(run / 'my.py').a == 2
