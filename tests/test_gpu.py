"""What differs on a GPU. Without one, the part of it that runs on a CPU."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmela.hooks import NetworkKLMeter, use_channels_last
from mmela.ops import layer_weighted_sum
from mmela.structure import attention_stages, layer_attentions, prune
from tests.helpers.backbones import BOTTLENECKS, build
from tests.helpers.runs import HOOK, decisions, divergences, pruned, states
from tests.helpers.toy import ToyNetwork, toy_config, train
from tests.helpers.zoo import ATTENTIONS, PAPERS

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
needs_gpu = pytest.mark.skipif(not GPU, reason='needs a GPU')
SGD = dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=0.01)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def distance(result, expected):
    result, expected = result.detach().cpu().double(), expected.detach().cpu().double()
    return float((result - expected).norm() / expected.norm())


# --- layers -------------------------------------------------------------------


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', DTYPES if GPU else [torch.bfloat16])
@pytest.mark.parametrize('backend', ['reference', 'autograd'])
def test_weighted_sum(backend, dtype, channels_last):
    """All backends as in double precision on a CPU."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    attn = torch.rand(4, 8, 5).softmax(-1)
    values = [torch.randn(4, 64, 14, 14).to(dtype) for _ in range(5)]
    grad = torch.randn(4, 64, 14, 14).to(dtype)

    def run(backend, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = layer_weighted_sum(inputs[0], inputs[1:], backend)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out))]

    expected = run('reference', attn.double(), *(v.double() for v in values))
    found = run(
        backend,
        attn.to(DEVICE),
        *(v.to(DEVICE).to(memory_format=form) for v in values),
    )
    assert found[0].is_contiguous(memory_format=form)
    for result, e in zip(found, expected):
        assert distance(result, e) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.fixture(scope='module')
def single_precision():
    """Output and gradients on a CPU of each network, and the network."""
    results = {}

    def of(attention):
        if attention not in results:
            network = small_network(ATTENTIONS[attention])
            results[attention] = network, outputs(copy.deepcopy(network), images())
        return results[attention]

    return of


def small_network(attention):
    attention = dict(attention, drop_path=0.0)
    return build('mmpretrain', 'ResNet', attention, **BOTTLENECKS)


def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def outputs(network, x):
    """The last map, and the gradient of the last convolution.

    That of an earlier one has been through dozens of roundings.
    """
    out = network(x)[-1]
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out.float() * direction.to(out.device)).mean().backward()
    return [out, network.layer4[-1].conv3.weight.grad]


@pytest.mark.parametrize('channels_last', [False, True] if GPU else [True])
@pytest.mark.parametrize('dtype', DTYPES if GPU else [torch.float32])
@pytest.mark.parametrize('attention', PAPERS if GPU else ['MRLABase'])
def test_networks(single_precision, attention, dtype, channels_last):
    network, expected = single_precision(attention)
    network = copy.deepcopy(network)
    half = dtype != torch.float32
    with torch.autocast('cpu', dtype, enabled=half):
        on_cpu = outputs(copy.deepcopy(network), images())
    network.to(DEVICE)
    if channels_last:
        use_channels_last(network)
    with torch.autocast(DEVICE, dtype, enabled=half):
        found = outputs(network, images().to(DEVICE))
    for result, other, e in zip(found, on_cpu, expected):
        # In so small a network, roundings grow from norm to norm: as on a CPU
        assert distance(result, e) < 2 * distance(other, e) + 1e-2


@needs_gpu
@pytest.mark.parametrize('backend', ['auto', 'compile'])
def test_backends_in_a_network(single_precision, backend):
    attention = dict(ATTENTIONS['MRLABase'], backend=backend)
    network = small_network(attention)
    reference, expected = single_precision('MRLABase')
    network.load_state_dict(reference.state_dict())
    for result, e in zip(outputs(network.cuda(), images().cuda()), expected):
        assert distance(result, e) < 1e-2


@needs_gpu
def test_compiled(single_precision):
    """By inductor; and compiled again once an attention is pruned."""
    torch._dynamo.reset()
    network = copy.deepcopy(single_precision('MRLABase')[0]).cuda()
    network.compile()
    for gone in ((), list(layer_attentions(network))[1:3]):
        prune(network, gone)
        eager = copy.deepcopy(network)
        eager._compiled_call_impl = None
        expected = outputs(eager, images().cuda())
        network.zero_grad()
        for result, e in zip(outputs(network, images().cuda()), expected):
            assert distance(result, e) < 1e-2


@needs_gpu
@pytest.mark.parametrize('backend', ['auto', 'compile'])
def test_measuring_waits_for_nothing(backend):
    """A step of a window, whose statistics stay on the device."""
    attention = dict(ATTENTIONS['MRLABase'], backend=backend)
    network = small_network(attention).cuda()
    x = images().cuda()
    meter = NetworkKLMeter(attention_stages(network))
    meter.attach()
    network(x)[-1].mean().backward()  # the first use compiles
    torch.cuda.set_sync_debug_mode('error')
    try:
        network(x)[-1].mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    meter.detach()
    assert all(v is None or v.mean >= 0 for v in meter.compute().values())


# --- runs ---------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A process group of this process."""
    for key in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(key, '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    torch.distributed.init_process_group(
        'nccl' if GPU else 'gloo',
        init_method=f'file://{tmp_path}/store',
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return train(toy_config(tmp_path_factory.mktemp('plain'), HOOK))


def test_distributed(one_process, plain, tmp_path):
    """DDP, wrapped anew after each pruning, trains the same network."""
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=[0] if GPU else None,
        find_unused_parameters=False,
    )
    run = train(
        toy_config(tmp_path, HOOK, launcher='pytorch', model_wrapper_cfg=wrapper)
    )
    assert states(run.model) == states(plain.model)
    assert pruned(run.model)
    for key, value in run.model.module.state_dict().items():
        assert value.device.type == DEVICE
        torch.testing.assert_close(
            value, plain.model.state_dict()[key], rtol=1e-4, atol=1e-5
        )


@needs_gpu
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_loss_scaling(plain, tmp_path, dtype):
    """Mixed precision: near single precision, and not the same."""
    wrapper = dict(
        type='AmpOptimWrapper', optimizer=SGD, dtype=dtype, loss_scale='dynamic'
    )
    run = train(toy_config(tmp_path, HOOK, optim_wrapper=wrapper))
    found, expected = (divergences(decisions(r.work_dir)[0]) for r in (run, plain))
    assert found == pytest.approx(expected, rel=0.05)
    assert found != pytest.approx(expected, rel=1e-7)
    assert pruned(run.model)
    assert run.optim_wrapper.loss_scaler.get_scale() >= 1


@needs_gpu
def test_steps_that_overflow_are_left_out(tmp_path):
    """A scale far too large: halved until it fits; weights stay finite."""
    wrapper = dict(
        type='AmpOptimWrapper',
        optimizer=SGD,
        dtype='float16',
        loss_scale=dict(init_scale=2.0**20, growth_interval=10**6),
    )
    run = train(toy_config(tmp_path, HOOK, optim_wrapper=wrapper))
    assert run.optim_wrapper.loss_scaler.get_scale() < 2.0**20
    assert pruned(run.model)
    assert all(p.isfinite().all() for p in run.model.parameters())


@needs_gpu
def test_sync_bn(one_process):
    """Of one process, as BN: output, gradients and statistics."""
    torch.manual_seed(0)
    model = ToyNetwork(dict(type='MRLABase', head_dim=4)).cuda()
    prune(model, ['layer1.1.layer_attn'])
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(other.layer1[0].layer_attn.norm, nn.SyncBatchNorm)
    x, target = torch.randn(4, 8, 6, 6).cuda(), torch.zeros(4).cuda()
    for m in (model, other):
        m(x, target, mode='loss')['loss'].backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        if a.grad is None:
            assert b.grad is None, name
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


# --- detectors over torchvision's operators -----------------------------------


@pytest.fixture
def operators():
    pytest.importorskip('mmdet')
    ops = pytest.importorskip('mmcv.ops', exc_type=ImportError)
    if GPU and 'torchvision' not in ops.get_compiler_version():
        pytest.skip('mmcv is compiled')
    return ops


@needs_gpu
def test_operators_as_on_a_cpu(operators):
    torch.manual_seed(0)
    corners = torch.rand(300, 2) * 60
    boxes = torch.cat([corners, corners + torch.rand(300, 2) * 30], 1)
    scores = torch.rand(300)
    features = torch.randn(2, 8, 32, 40)
    rois = torch.cat([torch.arange(300.0)[:, None] % 2, boxes], 1)
    logits, labels = torch.randn(300, 5), torch.randint(5, (300,))

    def run(device):
        kept = operators.nms(boxes.to(device), scores.to(device), 0.5)[1]
        x = features.to(device).requires_grad_()
        pooled = operators.roi_align(x, rois.to(device), 7, 0.5, 2, 'avg', True)
        z = logits.to(device).requires_grad_()
        loss = operators.sigmoid_focal_loss(z, labels.to(device), 2.0, 0.25)
        gradients = torch.autograd.grad(pooled.square().sum() + loss, (x, z))
        return [kept, pooled, loss, *gradients]

    for result, e in zip(run('cuda'), run('cpu')):
        torch.testing.assert_close(result.cpu(), e, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize('net', ['faster-rcnn', 'mask-rcnn'])
@pytest.mark.parametrize('dtype', ['fp32', 'fp16'])
def test_detectors(operators, config_dir, net, dtype):
    """A step, the same loss in channels_last, and detections."""
    from mmela.benchmark.compare import parse_args
    from mmela.benchmark.networks import Contestant, Network

    config = str(config_dir / net.replace('-', '_') / f'{net}_r50_ela_fpn_1x_coco.py')
    args = parse_args(
        ['--net', config, '--size', '192x256', '--batch', '2', '--dtype', dtype]
    )
    contestant = Contestant('ela', Network(args), torch.device('cuda'))
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(float(contestant.train_step()))
        use_channels_last(contestant.model)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert all(p.isfinite().all() for p in contestant.model.parameters())
    contestant.model.eval()
    assert len(contestant.infer()) == 2


def test_toolbox_registry_is_there():
    """Or nothing above has built what it names."""
    assert MODELS.get('ToyNetwork') is ToyNetwork
