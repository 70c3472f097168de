"""Checkpoints of safetensors and on the Hub, by what loads checkpoints."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmela.compat.loaders import local_checkpoint, read_safetensors, write_safetensors
from mmela.structure import prune
from tests.helpers.runs import pruned
from tests.helpers.toy import ToyNetwork, toy_config, train

pytest.importorskip('safetensors')
PRUNED = ['layer1.1.layer_attn', 'layer2.3.layer_attn']


@pytest.fixture
def network():
    model = ToyNetwork(dict(type='MRLABase', head_dim=4))
    prune(model, PRUNED)
    return model


def assert_equal(state_dict, other):
    assert state_dict.keys() == other.keys()
    for key, value in state_dict.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def test_round_trip(tmp_path):
    """Shared memory, strides, and what a data set's ``metainfo`` may hold."""
    a = torch.arange(6.0).reshape(2, 3)
    state_dict = dict(a=a, part=a[1:], turned=a.T, mask=torch.tensor(True))
    meta = dict(
        dataset_meta=dict(classes=('cat', 'dog'), palette=[(1, 2, 3)]),
        weights=np.array([0.5, 2]),
        epoch=np.int64(3),
    )
    write_safetensors(tmp_path / 'x.safetensors', state_dict, meta)
    found = read_safetensors(tmp_path / 'x.safetensors')
    assert_equal(state_dict, found['state_dict'])
    assert found['meta'] == dict(
        dataset_meta=dict(classes=['cat', 'dog'], palette=[[1, 2, 3]]),
        weights=[0.5, 2.0],
        epoch=3,
    )


def test_from_an_address(tmp_path):
    write_safetensors(tmp_path / 'x.safetensors', dict(a=torch.ones(2)), dict(epoch=1))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/x.safetensors'
        for end in ('', '?download=true'):
            found = CheckpointLoader.load_checkpoint(url + end, 'cpu')
            assert found['meta'] == dict(epoch=1)
            assert found['state_dict']['a'].tolist() == [1, 1]
        server.shutdown()


def test_more_than_tensors_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match='extra is a dict; safetensors can only hold tensors'
    ):
        write_safetensors(tmp_path / 'x.safetensors', dict(extra={}), {})
    assert not (tmp_path / 'x.safetensors').exists()


def test_damaged(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, dict(a=torch.ones(9)), dict(epoch=1))
    whole = path.read_bytes()
    for content in (b'', whole[:20], whole[:-1], whole.replace(b'{\\"', b'[\\"')):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='x.safetensors is not a checkpoint or is'):
            CheckpointLoader.load_checkpoint(str(path))
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'none.safetensors'))


@pytest.mark.parametrize(
    'map_location', [None, 'cpu', torch.device('cpu'), lambda storage, name: storage]
)
def test_mmengine_loads_it(tmp_path, network, map_location):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, network.state_dict(), {})
    found = CheckpointLoader.load_checkpoint(str(path), map_location)
    assert_equal(network.state_dict(), found['state_dict'])


def test_load_from_and_init_cfg(tmp_path, network):
    """A run starts from it, with the pruned structure."""
    path = str(tmp_path / 'x.safetensors')
    write_safetensors(path, network.state_dict(), {})
    init = toy_config(tmp_path / 'init', epochs=1, lr=0.0)
    init.model.init_cfg = dict(type='Pretrained', checkpoint=path)
    load = toy_config(tmp_path / 'load', epochs=1, lr=0.0, load_from=path)
    for cfg in (load, init):
        runner = train(cfg)
        assert pruned(runner.model) == PRUNED
        assert torch.equal(runner.model.head.weight, network.head.weight)


class TestHub:
    def test_loads(self, hub, tmp_path, network):
        path = tmp_path / 'model.safetensors'
        write_safetensors(path, network.state_dict(), dict(epoch=2))
        torch.save(dict(state_dict=dict(a=torch.ones(2))), tmp_path / 'x.pth')
        hub.repos['ann/net'] = {
            'model.safetensors': path.read_bytes(),
            'runs/x.pth': (tmp_path / 'x.pth').read_bytes(),
        }
        for form in ('ann/net', 'ann/net@v1', 'ann/net/model.safetensors'):
            found = CheckpointLoader.load_checkpoint(f'hf://{form}', 'cpu')
            assert found['meta'] == dict(epoch=2)
            assert_equal(network.state_dict(), found['state_dict'])
        found = CheckpointLoader.load_checkpoint('hf://ann/net@main/runs/x.pth')
        assert found['state_dict']['a'].tolist() == [1, 1]
        # One download of each file, however often it is loaded
        gets = [r for r in hub.requests if r.startswith('GET /ann/')]
        assert sorted(gets) == [
            'GET /ann/net/resolve/main/model.safetensors',
            'GET /ann/net/resolve/main/runs/x.pth',
        ]

    def test_without_network_from_the_cache(self, hub):
        hub.repos['ann/net'] = {'x.pth': b'content'}
        first = local_checkpoint('hf://ann/net/x.pth')
        hub.close()
        assert local_checkpoint('hf://ann/net/x.pth') == first
        with pytest.raises(OSError, match='hf://ann/net/y.pth cannot be downloaded'):
            local_checkpoint('hf://ann/net/y.pth')

    @pytest.mark.parametrize(
        'path, match',
        [
            ('hf://ann/none', 'hf://ann/none cannot be .*Repository Not Found'),
            ('hf://ann/net', 'hf://ann/net cannot be .*model.safetensors'),
            ('hf://ann/net@v9/x.pth', 'v9/x.pth cannot be downloaded'),
        ],
    )
    def test_what_is_not_there(self, hub, path, match):
        hub.repos['ann/net'] = {'x.pth': b''}
        with pytest.raises(OSError, match='(?s)' + match):
            local_checkpoint(path)

    @pytest.mark.parametrize('path', ['hf://', 'hf://net', 'hf://ann/net@', 'hf:///x'])
    def test_no_such_form(self, path):
        with pytest.raises(ValueError, match='does not have the form hf://USER/REPO'):
            local_checkpoint(path)
