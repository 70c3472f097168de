"""Copies of all kinds have the structure, and run their own attentions."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from mmela.layers import LayerAttention
from mmela.structure import layer_attentions, prune
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    ATTENTIONS,
    NETWORKS,
    ONE_OF_EACH,
    attach,
    attached,
    equal,
    gap,
    image,
    plain,
    run,
    some,
    states,
    tensors,
)


def saved_and_loaded(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPYING = dict(
    deepcopy=copy.deepcopy,
    pickle=lambda network: pickle.loads(pickle.dumps(network)),
    saved=saved_and_loaded,
    twice=lambda network: copy.deepcopy(pickle.loads(pickle.dumps(network))),
)


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('copying', COPYING)
def test_copies_are_on_their_own(copying, name):
    network, x = attached(name), image(name)
    prune(network, some(network))
    before = run(network, x)
    clone = COPYING[copying](network)
    assert states(clone) == states(network)
    assert equal(run(clone, x), before)
    for module in clone.modules():
        if isinstance(module, LayerAttention):
            for param in module.parameters():
                nn.init.normal_(param)
    assert not equal(run(clone, x), before)
    prune(clone, list(layer_attentions(clone)))
    assert equal(run(clone, x), run(plain(name), x))
    assert equal(run(network, x), before)


class FloatEntries:
    """Averages what is floating-point, as many training scripts do."""

    def __init__(self, model, decay=0.9):
        self.module = copy.deepcopy(model).eval()
        self.decay = decay

    def update(self, model):
        entries = model.state_dict()
        with torch.no_grad():
            for key, value in self.module.state_dict().items():
                if value.dtype.is_floating_point:
                    value.mul_(self.decay).add_(entries[key], alpha=1 - self.decay)


def timm_ema(name):
    def make(model):
        utils = pytest.importorskip('timm.utils')
        return getattr(utils, name)(model, decay=0.9)

    return make


AVERAGING = {
    'swa': AveragedModel,
    'swa, buffers averaged': lambda m: AveragedModel(m, use_buffers=True),
    'ema': lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    'ema, buffers averaged': lambda m: AveragedModel(
        m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
    'ema one by one': lambda m: AveragedModel(
        m, avg_fn=get_ema_avg_fn(0.9), use_buffers=True
    ),
    'timm 1': timm_ema('ModelEma'),
    'timm 2': timm_ema('ModelEmaV2'),
    'timm 3': timm_ema('ModelEmaV3'),
    'float entries': FloatEntries,
}


@pytest.mark.parametrize('averaging', AVERAGING)
@pytest.mark.parametrize('name', ['own.maps', 'torchvision.mobilenet_v2', 'timm.vit'])
@pytest.mark.parametrize('keep_value', [False, True])
def test_averaged_copies(averaging, name, keep_value):
    """A copy is pruned where the network is; what it cannot be, it says."""
    network, x = attached(name), image(name)
    average = AVERAGING[averaging](network)
    update = getattr(average, 'update_parameters', None) or average.update
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001)

    def step():
        network.train()
        optimizer.zero_grad()
        sum(out.square().mean() for out in tensors(network(x))).backward()
        optimizer.step()
        update(network)

    def check():
        clone = getattr(average, 'ema', None) or average.module
        clone.eval()
        try:
            found, out = states(clone), run(clone, x)
        except (RuntimeError, ValueError) as error:
            assert 'layer_attn' in str(error)
            return
        assert found == states(network)
        expected = copy.deepcopy(clone)
        for one, other in zip(
            *(layer_attentions(n).values() for n in (expected, network))
        ):
            one.attention_state = other.attention_state
        expected.eval()
        assert equal(out, run(expected, x))

    step(), step(), check()
    prune(network, some(network, 0), keep_value)
    for _ in range(4):
        step(), check()


def entries(network):
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('mode', [False, True])
def test_functional_call_with_the_state_of_another_structure(name, mode):
    whole, x = attached(name), image(name)
    pruned = copy.deepcopy(whole)
    prune(pruned, some(pruned))
    assert not equal(run(whole, x), run(pruned, x))
    for network, other in ((whole, pruned), (pruned, whole)):
        network.train(mode), other.train(mode)
        # As parameters, without which nn.MultiheadAttention takes another way
        given = {k: copy.deepcopy(v) for k, v in entries(other).items()}
        torch.manual_seed(0)
        expected = run(copy.deepcopy(other), x)
        before = states(network)
        torch.manual_seed(0)
        with torch.no_grad():
            out = tensors(functional_call(network, given, (x,)))
        assert equal(out, expected)
        assert states(network) == before


def replicate(network):
    """One replica, as ``nn.parallel.replicate`` makes it for each GPU."""
    replicas = {m: m._replicate_for_data_parallel() for m in network.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for key, child in module._modules.items():
            setattr(replica, key, replicas.get(child))
            replica._modules[key] = replicas.get(child)
        for key, param in module._parameters.items():
            if param is None:
                replica._parameters[key] = None
            else:
                value = param * 1
                setattr(replica, key, value)
                replica._former_parameters[key] = value
        for key, buffer in module._buffers.items():
            replica._buffers[key] = None if buffer is None else buffer.clone()
    return replicas[network]


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_replicas_of_data_parallel(name, attention):
    network, x = attached(name, attention), image(name)
    prune(network, some(network, 3))
    before = run(network, x)
    replicas = [replicate(network) for _ in range(2)]
    assert all(equal(run(replica, x), before) for replica in replicas)
    # Each runs its own attentions
    for attention in replicas[1].modules():
        if isinstance(attention, LayerAttention):
            for module in attention.modules():
                for key in module._former_parameters:
                    setattr(module, key, getattr(module, key) * 0)
    assert not equal(run(replicas[1], x), before)
    assert equal(run(replicas[0], x), before)
    # The gradient comes to the parameters of the original
    sum(out.square().mean() for out in tensors(replicas[0](x))).backward()
    mine = {k: p.grad for k, p in network.named_parameters()}
    network.zero_grad()
    sum(out.square().mean() for out in tensors(network(x))).backward()
    for key, param in network.named_parameters():
        assert (param.grad is None) == (mine[key] is None), key
        if param.grad is not None:
            torch.testing.assert_close(mine[key], param.grad)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_threads(name):
    network = attached(name, 'KCLA')
    inputs = [image(name, seed=seed) for seed in range(4)]
    expected = [run(network, x) for x in inputs]
    results = {}

    def work(index):
        results[index] = [run(network, inputs[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, found in results.items():
        assert all(equal(out, expected[index]) for out in found)
    assert len(results) == 4


def feature_extractor(network):
    tools = pytest.importorskip('torchvision.models.feature_extraction')
    nodes = tools.get_graph_node_names(network)[1]
    return tools.create_feature_extractor(network, nodes[-1:])


TRACING = dict(
    symbolic=torch.fx.symbolic_trace,
    twice=lambda network: copy.deepcopy(torch.fx.symbolic_trace(network)),
    features=feature_extractor,
)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('name', ['torchvision.resnet18', 'torchvision.mobilenet_v2'])
@pytest.mark.parametrize('tracing', TRACING)
def test_symbolic_traces(tracing, name, attention):
    """Right, or refused: never a network without its attentions."""
    x = image(name)
    assert equal(run(TRACING[tracing](plain(name)), x), run(plain(name), x))
    network = attached(name, attention)
    prune(network, some(network, 3))
    try:
        out = run(TRACING[tracing](network), x)
    except Exception as error:  # torch.fx raises errors of many kinds
        assert str(error)
    else:
        assert gap(out, run(network, x)) < 1e-5
    # And the original runs as before; tracing leaves some in training mode
    network.eval()
    assert equal(run(network, x), run(copy.deepcopy(network), x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', NETWORKS)
def test_data_types(name, dtype):
    x = image(name).to(dtype)
    network = plain(name).to(dtype)
    try:
        run(network, x)
    except RuntimeError as error:  # some networks fail in half, without attention
        pytest.skip(str(error))
    before = attach(network, name)
    before.eval()
    after = attached(name)
    prune(after, some(after))
    after = after.to(dtype)
    assert states(after) == [2 * (i % 2) for i in range(len(states(after)))]
    kinds = [{k: v.dtype for k, v in n.state_dict().items()} for n in (before, after)]
    assert kinds[0] == kinds[1]
    before.load_state_dict(after.state_dict())
    assert states(before) == states(after)
    outs = run(before, x)
    assert {out.dtype for out in outs} == {dtype}
    assert equal(outs, run(after, x))


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_data_types_of_every_attention(attention, dtype):
    for name in ('own.maps', 'own.tokens'):
        network = attach(plain(name).to(dtype), name, attention)
        network.train()
        out = tensors(network(image(name).to(dtype)))[0]
        assert out.dtype == dtype
        out.square().mean().backward()
        for key, param in network.named_parameters():
            assert param.dtype == dtype, key
            assert param.grad is None or param.grad.isfinite().all(), key


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('assign', [False, True])
def test_built_on_the_meta_device(attention, assign):
    name = 'mmdet.ResNet'
    expected, x = attached(name, attention), image(name)
    if attention != 'AA':  # which the convolution needs
        prune(expected, some(expected))
    with torch.device('meta'):
        network = attach(NETWORKS[name].make(), name, attention)
    assert {v.device.type for v in entries(network).values()} == {'meta'}
    assert list(layer_attentions(network)) == list(layer_attentions(expected))
    if not assign:
        network = network.to_empty(device='cpu')
    network.load_state_dict(expected.state_dict(), assign=assign)
    network.eval()
    assert states(network) == states(expected)
    assert equal(run(network, x), run(expected, x))


@pytest.mark.parametrize('name', ['own.maps', 'own.tokens', 'torchvision.swin'])
def test_meta_device_of_other_networks(name):
    expected, x = attached(name), image(name)
    prune(expected, some(expected, 0))
    with torch.device('meta'):
        network = NETWORKS[name].make()
    network = attach(network, name)
    network = network.to_empty(device='cpu')
    # Buffers that are in no state dict are those of the network itself
    for key, buffer in expected.named_buffers():
        if key not in expected.state_dict():
            network.get_buffer(key).copy_(buffer)
    network.load_state_dict(expected.state_dict())
    network.eval()
    assert states(network) == states(expected)
    assert equal(run(network, x), run(expected, x))


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('attention', ['MRLABase', 'KCLA', 'AttnRes'])
def test_traced(name, attention):
    """Sizes of maps are tensors in a trace. What traces without attentions does so
    with them."""
    network, x = attached(name, attention), image(name)
    with torch.no_grad():
        try:
            torch.jit.trace(plain(name), x, strict=False, check_trace=False)
            traces = True
        except RuntimeError:
            traces = False
        try:
            traced = torch.jit.trace(network, x, strict=False, check_trace=False)
        except RuntimeError:
            assert not traces
        else:
            assert gap(run(traced, x), run(network, x)) < 1e-4  # sums in other orders
