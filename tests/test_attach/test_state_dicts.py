"""State dicts: whatever is done to one, it loads right, or it is refused or said."""

import contextlib
import logging
import warnings

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint
from torch import nn

from mmela.structure import layer_attentions, prune
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    NETWORKS,
    attached,
    equal,
    gap,
    image,
    plain,
    run,
    some,
    states,
)

SOME = ['mmdet.ResNet', 'timm.vit', 'torchvision.mobilenet_v2', 'own.maps']


def pruned_network(name, keep_value=False, attention='MRLABase'):
    network = attached(name, attention)
    prune(network, some(network), keep_value)
    return network


@contextlib.contextmanager
def listening():
    """What is logged or warned of meanwhile."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    loggers = [MMLogger.get_current_instance(), logging.getLogger()]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            yield heard
        heard += [str(warning.message) for warning in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def refused_or_said(load, state_dict):
    """Whether an error or a message names an attention."""
    with listening() as heard:
        try:
            load(state_dict)
        except (RuntimeError, ValueError) as error:
            heard.append(str(error))
    return any('layer_attn' in text for text in heard)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('name', SOME)
def test_every_key_is_of_a_parameter_or_a_buffer(name, attention):
    network = attached(name, attention)
    known = {*dict(network.named_parameters()), *dict(network.named_buffers())}
    extra = {k for k in network.state_dict() if k.endswith('_extra_state')}
    assert set(network.state_dict()) - extra <= known
    for key in layer_attentions(network):
        assert f'{key}.state' in dict(network.named_buffers())
    # Only what an attention needs
    added = set(network.state_dict()) - set(plain(name).state_dict())
    assert {key.split('.layer_attn.')[0] for key in added} == {
        key[: -len('.layer_attn')] for key in layer_attentions(network)
    }


CASTS = {
    'half': lambda v: v.half(),
    'bfloat16': lambda v: v.bfloat16(),
    'float': lambda v: v.float(),
    'double': lambda v: v.double(),
    'numpy': lambda v: torch.from_numpy(v.numpy()),
    'clone': lambda v: v.clone(),
}


def each(state_dict, function):
    return {
        key: function(value) if torch.is_tensor(value) else value
        for key, value in state_dict.items()
    }


@pytest.mark.parametrize('cast', CASTS)
@pytest.mark.parametrize('name', NETWORKS)
def test_cast(name, cast):
    network = pruned_network(name)
    state_dict = each(network.state_dict(), CASTS[cast])
    new = attached(name)
    new.load_state_dict(state_dict)
    assert states(new) == states(network)
    found, expected = run(new, image(name)), run(network, image(name))
    if cast in ('float', 'double', 'numpy', 'clone'):
        assert equal(found, expected)
    else:
        assert gap(found, expected) < 0.3


def mean(dicts, kind):
    """An average as scripts make it."""
    first, count = dicts[0], len(dicts)
    if kind == 'in double':
        return {k: (sum(d[k].double() for d in dicts) / count).float() for k in first}
    if kind == 'own types':
        return {k: (sum(d[k] for d in dicts) / count).to(first[k].dtype) for k in first}
    if kind == 'floats alone':
        return {
            k: sum(d[k] for d in dicts) / count
            if v.is_floating_point()
            else sum(d[k] for d in dicts) // count
            for k, v in first.items()
        }
    result = {k: v.clone() for k, v in first.items()}  # one after the other
    for number, other in enumerate(dicts[1:], 2):
        for key, value in result.items():
            if value.is_floating_point():
                value += (other[key] - value) / number
    return result


KINDS = ('in double', 'own types', 'floats alone', 'running')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('count', [2, 3, 7])
@pytest.mark.parametrize('keep_value', [False, True])
def test_averages_of_one_structure(kind, count, keep_value):
    name = 'own.maps'
    network = pruned_network(name, keep_value)
    dicts = [
        {k: v for k, v in network.state_dict().items() if torch.is_tensor(v)}
        for _ in range(count)
    ]
    new = attached(name)
    new.load_state_dict(mean(dicts, kind))
    assert states(new) == states(network)
    assert gap(run(new, image(name)), run(network, image(name))) < 1e-3


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('weights', [(1, 1), (1, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize('name', ['own.maps', 'timm.vit'])
def test_averages_of_two_structures_are_refused_or_said(name, kind, weights):
    whole, pruned = attached(name), pruned_network(name)
    states_of = [n.state_dict() for n in (whole, pruned)]
    dicts = [
        {k: v for k, v in state_dict.items() if torch.is_tensor(v)}
        for state_dict, times in zip(states_of, weights)
        for _ in range(times)
    ]
    average = dict(states_of[0], **mean(dicts, kind))
    assert refused_or_said(attached(name).load_state_dict, average)


@pytest.mark.parametrize(
    'value', [3, -1, 258, 256, -254, 0.5, 1.9, -0.0001, 2.5, 1e9, float('inf')]
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.int64])
def test_states_that_there_are_not(value, dtype):
    if dtype == torch.int64 and int(min(value, 1e9)) != value:
        pytest.skip('no integer')
    network = attached('own.maps')
    key = f'{list(layer_attentions(network))[1]}.state'
    state_dict = dict(network.state_dict(), **{key: torch.tensor(value, dtype=dtype)})
    assert refused_or_said(attached('own.maps').load_state_dict, state_dict)


def test_a_state_that_is_no_number():
    network = attached('own.maps')
    key = f'{list(layer_attentions(network))[1]}.state'
    for value in (torch.tensor(float('nan')), torch.tensor([2.0, 2.0])):
        state_dict = dict(network.state_dict(), **{key: value})
        assert refused_or_said(attached('own.maps').load_state_dict, state_dict)


@pytest.mark.parametrize('keep_value', [False, True])
@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('name', SOME)
def test_a_missing_state_is_an_error_everywhere(tmp_path, name, strict, keep_value):
    network = pruned_network(name, keep_value)
    gone = f'{some(network)[0]}.state'
    state_dict = {k: v for k, v in network.state_dict().items() if k != gone}
    with pytest.raises((RuntimeError, ValueError), match='state'):
        attached(name).load_state_dict(state_dict, strict=strict)
    torch.save(dict(state_dict=state_dict), tmp_path / 'x.pth')
    with pytest.raises((RuntimeError, ValueError), match='state'):
        load_checkpoint(attached(name), str(tmp_path / 'x.pth'), strict=strict)


@pytest.mark.parametrize('name', NETWORKS)
def test_not_strict(name):
    """Plain to attached and back, and between structures."""
    network, x = pruned_network(name), image(name)
    new = attached(name, zero_init=True)
    result = new.load_state_dict(plain(name).state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all('.layer_attn.' in key for key in result.missing_keys)
    assert set(states(new)) == {0}
    assert equal(run(new, x), run(plain(name), x))

    result = plain(name).load_state_dict(network.state_dict(), strict=False)
    assert not result.missing_keys
    assert all('.layer_attn.' in key for key in result.unexpected_keys)

    new.load_state_dict(network.state_dict(), strict=False)
    assert states(new) == states(network)


def set_key(network, key, value):
    """As loaders of large models do: one tensor of one module at a time."""
    path, _, name = key.rpartition('.')
    module = network.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, value.requires_grad)
    elif name in module._buffers:
        module._buffers[name] = value
    else:
        raise ValueError(f'{module} does not have a parameter or a buffer named {name}')


def copy_key(network, key, value):
    """In place, as scripts do."""
    with torch.no_grad():
        network.state_dict()[key].copy_(value)


def set_attribute(network, key, value):
    path, _, name = key.rpartition('.')
    module = network.get_submodule(path)
    setattr(module, name, nn.Parameter(value) if name in module._parameters else value)


ONE_BY_ONE = dict(replaced=set_key, in_place=copy_key, attribute=set_attribute)


@pytest.mark.parametrize('loading', ONE_BY_ONE)
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('back', [False, True])
def test_key_by_key(name, loading, back):
    """A whole network becomes a pruned one, or a pruned one whole."""
    source, target = attached(name), pruned_network(name)
    if not back:
        source, target = target, source
    x = image(name)
    run(target, x)  # which must leave nothing behind
    for key, value in source.state_dict().items():
        if not key.endswith('_extra_state'):
            ONE_BY_ONE[loading](target, key, value.clone())
    # nn.MultiheadAttention multiplies otherwise with a weight that lies elsewhere
    assert gap(run(target, x), run(source, x)) < 1e-5
    assert states(target) == states(source)


@pytest.mark.parametrize('name', SOME)
def test_safetensors(tmp_path, name):
    files = pytest.importorskip('safetensors.torch')
    network, x = pruned_network(name), image(name)
    files.save_model(network, str(tmp_path / 'model.safetensors'))
    new = attached(name)
    files.load_model(new, str(tmp_path / 'model.safetensors'))
    assert states(new) == states(network) and equal(run(new, x), run(network, x))

    state_dict = {k: v.contiguous() for k, v in network.state_dict().items()}
    files.save_file(state_dict, str(tmp_path / 'state.safetensors'))
    new = attached(name)
    new.load_state_dict(files.load_file(str(tmp_path / 'state.safetensors')))
    assert states(new) == states(network) and equal(run(new, x), run(network, x))


@pytest.mark.parametrize('name', SOME)
def test_state_dicts_of_distributed_checkpoints(tmp_path, name):
    tools = pytest.importorskip('torch.distributed.checkpoint.state_dict')
    files = pytest.importorskip('torch.distributed.checkpoint')
    network, new, x = pruned_network(name), attached(name), image(name)
    state_dict = tools.get_model_state_dict(network)
    tools.set_model_state_dict(new, {k: v.clone() for k, v in state_dict.items()})
    assert states(new) == states(network) and equal(run(new, x), run(network, x))

    files.save(dict(model=state_dict), checkpoint_id=tmp_path, no_dist=True)
    new = attached(name)
    loaded = dict(model=tools.get_model_state_dict(new))
    files.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    tools.set_model_state_dict(new, loaded['model'])
    assert states(new) == states(network) and equal(run(new, x), run(network, x))
