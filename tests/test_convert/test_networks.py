"""Opening networks for the command line: what is wrong is one line."""

import io
import random
import runpy
from pathlib import Path

import pytest
import torch

from mmela.command_line import one_line
from mmela.convert.networks import load_fitting, open_network, read_state_dict
from tests.helpers.checkpoint_fuzz import archive, damage
from tests.helpers.published_networks import PublishedNetwork

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def tool(name, *args):
    runpy.run_path(str(TOOLS / f'{name}.py'))['main'](list(map(str, args)))


def odd_values(rng):
    """What the name of a tensor in a damaged checkpoint may stand for."""
    return rng.choice(
        [
            *(None, 1, 'x', [], {}, (), b'x', True, torch.Size([2])),
            torch.zeros(0),
            torch.tensor(7),
            torch.full((3, 3), float('nan')),
            torch.zeros(2, 2, 2, 2, 2),
            torch.zeros(2).to_sparse(),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(2, device='meta'),
            torch.zeros(2, dtype=torch.bool),
            torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8),
        ]
    )


def damaged_checkpoints(content, count):
    """Files in which bytes, or values and names, are not what they were.

    Args:
        content (dict): A checkpoint with ``state_dict``.
        count (int): How many.
    """
    file = io.BytesIO()
    torch.save(content, file)
    for case in range(count):
        rng = random.Random(case)
        if case % 3 == 0:
            yield damage(rng, file.getvalue())
            continue
        changed = {**content, 'state_dict': dict(content['state_dict'])}
        inner = changed['state_dict']
        if case % 3 == 1:
            for key in rng.sample(sorted(inner), rng.choice([1, 1, 3, len(inner)])):
                inner[key] = odd_values(rng)
        else:
            where = rng.choice([changed, inner, inner])
            key = rng.choice(list(where))
            value = where.pop(key)
            new = rng.choice([None, 3, b'x', '', key + '.x', key[1:], '\x1b[31m', ()])
            where[new] = value
        again = io.BytesIO()
        torch.save(changed if rng.random() < 0.8 else inner, again)
        yield again.getvalue()


def outcome(name, *args):
    """None, or the line of the error; any other error goes through."""
    try:
        tool(name, *args)
    except SystemExit as error:
        line = str(error)
        assert line.startswith('error: ') and line.isprintable(), repr(line)
        assert len(line) < 20000
        return line
    return None


@pytest.mark.parametrize('arch', ['mrla_base', 'kcla'])
def test_published_on_damaged_checkpoints(tmp_path, arch):
    network = PublishedNetwork(arch, (2, 2, 2), '3x3', 16)
    content = dict(epoch=3, state_dict=network.state_dict)
    refused = 0
    for case, damaged in enumerate(damaged_checkpoints(content, 150)):
        src, dst = tmp_path / 'src.pth', tmp_path / f'{case}.pth'
        src.write_bytes(damaged)
        told = '--arch', arch, '--head-dim', '16'
        line = outcome('convert/published', src, dst, *told)
        refused += line is not None
        assert dst.exists() == (line is None)
    assert 100 < refused < 150


@pytest.fixture
def network(tmp_path, config_dir):
    """Config, checkpoint and what it holds, of a small pruned classifier."""
    registry = pytest.importorskip('mmpretrain.registry').MODELS
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', backbone=dict(type='ELAResNet',\n"
        "    depth=18, base_channels=8, layer_attention=dict(type='MRLABase',\n"
        '    head_dim=8)), neck=None, head=None)\n'
    )
    from mmengine.config import Config

    model = registry.build(Config.fromfile(config).model)
    model.backbone.layer2[1].layer_attn.attention_state = 2
    content = dict(meta=dict(epoch=1), state_dict=model.state_dict())
    torch.save(content, tmp_path / 'good.pth')
    return config, tmp_path / 'good.pth', content


def test_slim_on_damaged_checkpoints(network, tmp_path):
    config, _, content = network
    refused = 0
    for case, damaged in enumerate(damaged_checkpoints(content, 40)):
        src, dst = tmp_path / 'src.pth', tmp_path / f'{case}.pth'
        src.write_bytes(damaged)
        line = outcome('convert/slim', config, src, dst, '--size', 32)
        refused += line is not None
        assert dst.exists() == (line is None)
    assert 20 < refused < 40


@pytest.mark.parametrize(
    'text, match',
    [
        ("default_scope = 5\nmodel = dict(type='x')", 'config.py'),
        ("default_scope = []\nmodel = dict(type='x')", 'config.py'),
        ('model = 3', 'config.py has no model'),
        ('1 / 0', 'cannot be read: division'),
        ('raise RuntimeError("\\x1b[31mred")', r'cannot be read: \\x1b\[31mred'),
        ('model = (', 'cannot be read'),
    ],
)
def test_configs_that_are_none(network, tmp_path, text, match):
    config, checkpoint, _ = network
    config.write_text(text)
    with pytest.raises(SystemExit, match=match) as error:
        open_network(config, checkpoint)
    assert str(error.value).isprintable()


def test_open_network(network, tmp_path):
    config, checkpoint, content = network
    cfg, meta, state_dict = open_network(config, checkpoint)
    assert cfg.model.backbone.depth == 18 and meta == dict(epoch=1)
    assert state_dict.keys() == content['state_dict'].keys()
    torch.save(content['state_dict'], tmp_path / 'bare.pth')
    assert open_network(config, tmp_path / 'bare.pth')[1] == {}
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(content['state_dict'], tmp_path / 'x.safetensors')
    _, meta, other = open_network(config, tmp_path / 'x.safetensors')
    assert meta == {}
    assert all(torch.equal(value, other[key]) for key, value in state_dict.items())


def test_a_dict_with_methods_of_the_file(tmp_path):
    """An OrderedDict takes attributes from a file, also over its methods."""
    item = b'X\5\0\0\0itemsK\1'
    ordered = b'ccollections\nOrderedDict\n)R'
    (tmp_path / 'x.pth').write_bytes(
        archive(b'\x80\2' + ordered + b'}' + item + b'sb.')
    )
    with pytest.raises(ValueError, match='has no state dict'):
        read_state_dict(tmp_path / 'x.pth')


def test_load_fitting_says_what_does_not_fit():
    module = torch.nn.Linear(2, 3)
    state_dict = module.state_dict()
    load_fitting(module, state_dict, 'c.py', 'x.pth')
    for change, match in [
        (dict(weight=torch.zeros(1)), 'x.pth does not fit c.py: .*size mismatch'),
        (dict(weight=None), 'x.pth does not fit c.py: '),
        (dict(other=torch.zeros(1)), '1 keys are not in the network, such as other'),
    ]:
        with pytest.raises(ValueError, match=match):
            load_fitting(module, {**state_dict, **change}, 'c.py', 'x.pth')
    del state_dict['bias']
    with pytest.raises(ValueError, match='1 keys are missing, such as bias'):
        load_fitting(module, state_dict, 'c.py', 'x.pth')


def test_one_line_obeys_no_terminal():
    error = ValueError('a\x1b[31mb\r\n\tc\x9bd\u202e\x7f é \ud800')
    assert one_line(error) == r'a\x1b[31mb c\x9bd\u202e\x7f é \ud800'
    assert one_line(KeyError('x')) == 'x'


def test_refused_checkpoint_in_test(network, tmp_path, monkeypatch):
    config, checkpoint, _ = network
    damaged = tmp_path / 'damaged.pth'
    damaged.write_bytes(checkpoint.read_bytes()[:1000])
    other = tmp_path / 'x.safetensors'
    other.touch()
    for path, match in [
        (damaged, '^error: .*damaged.pth is not a checkpoint'),
        (other, '^error: .*x.safetensors is not a checkpoint'),
    ]:
        monkeypatch.setattr('sys.argv', ['test.py', str(config), str(path)])
        with pytest.raises(SystemExit, match=match) as error:
            runpy.run_path(str(TOOLS / 'test.py'), run_name='__main__')
        assert '\n' not in str(error.value)
