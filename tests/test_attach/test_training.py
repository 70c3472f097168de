"""Training: what the user freezes, unfreezes, wraps or checkpoints stays so."""

import copy
import itertools
import logging
import tempfile

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmela import attach_layer_attention
from mmela.layers import AttentionState
from mmela.structure import layer_attentions, prune
from tests.helpers.attachable import Conv, Trunk
from tests.helpers.toy import CHANNELS, toy_config, train
from tests.helpers.zoo import (
    AFTER_BLOCKS,
    CONVNEXT,
    NETWORKS,
    ONE_OF_EACH,
    attach,
    attached,
    image,
    plain,
    run,
    stir,
    tensors,
    timm,
    toolbox,
)

# -- what is frozen --------------------------------------------------------------


def step(network, x, optimizer=None):
    network.zero_grad()
    sum(out.square().mean() for out in tensors(network(x))).backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('calls', [['train'], ['eval', 'train'], ['forward', 'train']])
def test_flags_stay_as_the_user_sets_them(name, calls):
    network, x = attached(name), image(name)
    generator = torch.Generator().manual_seed(0)
    flags = {}
    for key, param in network.named_parameters():
        flags[key] = bool(torch.rand((), generator=generator) < 0.5)
        param.requires_grad_(flags[key])
    for call in calls:
        if call == 'forward':
            run(network, x)
        else:
            getattr(network, call)()
    step(network, x)
    assert {k: p.requires_grad for k, p in network.named_parameters()} == flags
    for key, param in network.named_parameters():
        assert flags[key] or param.grad is None, key


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('order', ['attach first', 'freeze first'])
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_attentions_alone(name, order, attention):
    """A pretrained network is frozen, and its attentions are trained."""
    network, x = plain(name), image(name)
    if order == 'freeze first':
        network.requires_grad_(False)
    attach(network, name, attention, drop_path=0.0)
    if order == 'attach first':
        network.requires_grad_(False)
    modules = layer_attentions(network).values()
    assert modules
    for module in modules:
        module.requires_grad_(True)
    wanted = {k for k, p in network.named_parameters() if p.requires_grad}
    assert wanted == {k for k, _ in network.named_parameters() if '.layer_attn.' in k}
    optimizer = torch.optim.SGD([network.get_parameter(k) for k in wanted], lr=0.1)
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    silent = set()

    def note(module, args, out):
        # The kernel of focused attention is 0 where query and key are negative
        if not out.any():
            silent.add(module)

    for module in modules:
        module.register_forward_hook(note)
    for _ in range(2):
        network.train()
        step(network, x, optimizer)
    assert not silent or attention == 'focused'
    assert {k for k, p in network.named_parameters() if p.requires_grad} == wanted
    moved = {k for k, p in network.named_parameters() if not torch.equal(p, before[k])}
    assert moved <= wanted
    # Each attention takes part; single weights of it may have no gradient
    for key, module in layer_attentions(network).items():
        assert module.training, key
        if any(True for _ in module.parameters()) and module not in silent:
            assert any(name.startswith(key) for name in moved), key


@pytest.mark.parametrize('name', ['torchvision.resnet18', 'timm.resnet'])
def test_gradual_unfreezing(name):
    """By the names of blocks, as fine-tuning does it: attentions are part of them."""
    network = attached(name)
    network.requires_grad_(False)
    for stage in ('layer4', 'layer3', 'layer2', 'layer1'):
        for key, param in network.named_parameters():
            if key.startswith(stage):
                param.requires_grad_(True)
        network.train()
        open_stages = ('layer4', 'layer3', 'layer2', 'layer1')
        open_stages = open_stages[: open_stages.index(stage) + 1]
        for key, module in layer_attentions(network).items():
            trained = key.startswith(open_stages)
            assert all(p.requires_grad == trained for p in module.parameters()), key


@pytest.mark.parametrize('keep_value', [False, True])
def test_pruning_gives_back_only_what_it_took(keep_value):
    name = 'own.maps'
    network = attached(name)
    keys = list(layer_attentions(network))
    network.get_submodule(keys[1]).requires_grad_(False)
    flags = {k: p.requires_grad for k, p in network.named_parameters()}
    prune(network, keys[1:3], keep_value)
    network.train()
    for key in keys[1:3]:
        network.get_submodule(key).attention_state = AttentionState.ACTIVE
    network.train()
    assert {k: p.requires_grad for k, p in network.named_parameters()} == flags


def test_modes_are_those_that_the_user_sets():
    network = attached('torchvision.resnet18')
    network.train()
    network.layer2.eval()
    for key, module in layer_attentions(network).items():
        assert module.training == (not key.startswith('layer2')), key
    run(network, image('torchvision.resnet18'))
    for key, module in layer_attentions(network).items():
        assert module.training == (not key.startswith('layer2')), key
        assert all(m.training == module.training for m in module.modules()), key


# -- a run whose backbone is frozen for some epochs --------------------------------


@MODELS.register_module()
class AttachedToy(BaseModel):
    """A backbone that was given attentions, and a head."""

    network = Trunk

    def __init__(self):
        super().__init__()
        blocks = [Conv(CHANNELS, CHANNELS) for _ in range(4)]
        self.backbone = self.network(nn.Conv2d(CHANNELS, CHANNELS, 1), *blocks)
        attach_layer_attention(
            self.backbone,
            dict(type='MRLABase', head_dim=4),
            input_size=(6, 8),
            input_channels=CHANNELS,
        )
        self.head = nn.Linear(CHANNELS, 1)

    def forward(self, inputs, target, mode='tensor'):
        out = self.head(self.backbone(inputs).mean((2, 3)))[:, 0]
        if mode == 'loss':
            return dict(loss=(out - target).square().mean())
        return list(out) if mode == 'predict' else out


@HOOKS.register_module()
class FreezeFor(Hook):
    """Freezes the backbone in the first epochs."""

    def __init__(self, epochs, when, eval_too=False):
        self.epochs, self.when, self.eval_too = epochs, when, eval_too

    def _set(self, runner, trained):
        runner.model.backbone.requires_grad_(trained)
        if self.eval_too and not trained:
            runner.model.backbone.eval()

    def before_run(self, runner):
        if self.when == 'before_run':
            self._set(runner, False)

    def before_train(self, runner):
        if self.when == 'before_train':
            self._set(runner, False)

    def before_train_epoch(self, runner):
        if runner.epoch == self.epochs:
            self._set(runner, True)
        elif runner.epoch < self.epochs and self.when == 'before_train_epoch':
            self._set(runner, False)


def frozen_run(work_dir, windows, when, priority, **kwargs):
    hook = dict(windows=windows, policy=dict(type='FixedCount', count=1))
    cfg = toy_config(work_dir, hook, epochs=4, model=dict(type='AttachedToy'))
    freeze = dict(type='FreezeFor', epochs=2, when=when, priority=priority, **kwargs)
    cfg.custom_hooks.append(freeze)
    return train(cfg)


WHENS = ('before_run', 'before_train', 'before_train_epoch')


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
@pytest.mark.parametrize('when', WHENS)
@pytest.mark.parametrize('eval_too', [False, True])
def test_frozen_for_some_epochs(tmp_path, when, priority, eval_too):
    """The window is later, and counts, in whatever order the hooks run."""
    runner = frozen_run(tmp_path, [(3, 3)], when, priority, eval_too=eval_too)
    modules = layer_attentions(runner.model).values()
    assert [module.active for module in modules].count(False) == 1
    # What is not pruned is trained again
    for module in modules:
        assert all(p.requires_grad == module.active for p in module.parameters())


def heard_in(function):
    """Warnings that are logged meanwhile, and the error that it ends with."""
    heard, original = [], MMLogger.callHandlers  # which calls no parent's

    def listen(logger, record):
        if record.levelno >= logging.WARNING:
            heard.append(record.getMessage())
        original(logger, record)

    MMLogger.callHandlers = listen
    try:
        function()
    except (RuntimeError, ValueError) as error:
        heard.append(str(error))
    finally:
        MMLogger.callHandlers = original
    return heard


@pytest.mark.parametrize('when', WHENS)
def test_a_window_while_all_is_frozen(tmp_path, when):
    """Prunes by chance: the message says that the network is frozen."""
    windows = [(1, 1), (4, 4)]
    heard = heard_in(lambda: frozen_run(tmp_path, windows, when, 'NORMAL'))
    assert any('frozen' in text or 'freez' in text for text in heard)


# -- attentions that no pass reaches ----------------------------------------------


class LastByAnotherName(Trunk):
    """Training runs the last block by another way than evaluation."""

    def forward(self, x):
        *blocks, last = self.body
        for block in blocks:
            x = block(x)
        return type(last).forward(last, x) if self.training else last(x)


@MODELS.register_module()
class AnotherName(AttachedToy):
    network = LastByAnotherName


@pytest.mark.parametrize('kind', ['AttachedToy', 'AnotherName'])
def test_the_hook_names_attentions_that_no_pass_reached(tmp_path, kind):
    hook = dict(windows=[(2, 2)], policy=dict(type='FixedCount', count=1))
    cfg = toy_config(tmp_path, hook, epochs=2, model=dict(type=kind))
    # By the hook, or by the first backward pass, which comes before
    heard = heard_in(lambda: train(cfg))
    said = [t for t in heard if 'body.4' in t and ('not run' in t or 'never ran' in t)]
    assert bool(said) == (kind != 'AttachedToy')
    assert not any('body.3.layer_attn' in text for text in said)


# -- learning rates by layer --------------------------------------------------------


def rates(backbone, constructor, **paramwise):
    model = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(1, 1)))
    if constructor.startswith('mmpretrain'):  # which asks the model for its layers
        head = dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=8)
        cfg = dict(type='mmpretrain.ImageClassifier', backbone=backbone, head=head)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(cfg)
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor=constructor,
            paramwise_cfg=paramwise,
        ),
    )
    by_param = {id(p): g['lr'] for g in wrapper.param_groups for p in g['params']}
    return {n: by_param.get(id(p)) for n, p in backbone.named_parameters()}


ARCH = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
VIT = dict(arch=ARCH, img_size=32, patch_size=8)
SWIN = dict(embed_dims=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4])
FEATURES = dict(arch=CONVNEXT, gap_before_final_norm=False, out_indices=(0, 1, 2, 3))
LAYER_WISE = {
    'mmpretrain-ViT': ('mmpretrain', 'VisionTransformer', VIT),
    'mmpretrain-BEiT': ('mmpretrain', 'BEiTViT', VIT),
    'mmpretrain-Swin': (
        'mmpretrain',
        'SwinTransformer',
        dict(arch=SWIN, img_size=64, window_size=2),
    ),
    'mmpretrain-ConvNeXt': ('mmpretrain', 'ConvNeXt', dict(arch=CONVNEXT)),
    'mmdet-ConvNeXt': ('mmdet', 'ConvNeXt', FEATURES),
    'mmdet-ConvNeXt-stages': ('mmdet', 'ConvNeXt', FEATURES),
    'mmseg-ConvNeXt': ('mmseg', 'ConvNeXt', FEATURES),
    'mmseg-ConvNeXt-stages': ('mmseg', 'ConvNeXt', FEATURES),
}


@pytest.mark.parametrize('case', LAYER_WISE)
def test_an_attention_learns_at_the_rate_of_its_block(case):
    scope, name, cfg = LAYER_WISE[case]
    pytest.importorskip(f'{scope}.engine')
    # ConvNeXt is mmpretrain's in all three
    network = toolbox('mmpretrain', name, **cfg)()
    if scope == 'mmpretrain':
        constructor = 'mmpretrain.LearningRateDecayOptimWrapperConstructor'
        paramwise = dict(layer_decay_rate=0.5)
    else:
        constructor = f'{scope}.LearningRateDecayOptimizerConstructor'
        kind = 'stage_wise' if case.endswith('stages') else 'layer_wise'
        paramwise = dict(decay_rate=0.5, decay_type=kind, num_layers=6)
    expected = rates(copy.deepcopy(network), constructor, **paramwise)
    size = cfg.get('img_size', 64)
    attach_layer_attention(network, dict(type='MRLABase'), input_size=(size, size))
    found = rates(network, constructor, **paramwise)
    for key, rate in expected.items():
        assert found[key] == rate, key
    for name in layer_attentions(network):
        block = name[: -len('layer_attn')]
        of_block = {rate for key, rate in expected.items() if key.startswith(block)}
        of_attention = {rate for key, rate in found.items() if key.startswith(name)}
        assert of_attention == of_block and len(of_block) == 1, name
    assert len(set(found.values())) > 2


# -- wrappers -----------------------------------------------------------------------


@pytest.fixture
def one_process():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1
        )
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize(
    'wrap', [DataParallel, DistributedDataParallel, MMDistributedDataParallel]
)
def test_attaching_to_a_wrapper_is_refused(one_process, wrap):
    wrapped = wrap(plain('own.maps'))
    keys = list(wrapped.state_dict())
    with pytest.raises(ValueError, match=f'{wrap.__name__}.*module'):
        attach(wrapped, 'own.maps')
    assert list(wrapped.state_dict()) == keys
    # Inside another module too, as its gradients are its own matter
    with pytest.raises(ValueError, match=wrap.__name__):
        attach(Trunk(wrapped), 'own.maps')


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_wrapped_after_attaching(one_process, name):
    network, x = attached(name), image(name)
    network.train()
    reference = copy.deepcopy(network)
    wrapped = DistributedDataParallel(network, find_unused_parameters=True)
    step(wrapped, x), step(reference, x)
    for (key, param), other in zip(network.named_parameters(), reference.parameters()):
        assert (param.grad is None) == (other.grad is None), key
        if param.grad is not None:
            torch.testing.assert_close(param.grad, other.grad)
    assert list(layer_attentions(wrapped)) == list(layer_attentions(network))


# -- checkpointing ------------------------------------------------------------------


class Checkpointed(Trunk):
    """Recomputes blocks in the backward pass, as torch's tool does it."""

    how = None

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 1, 1), *(Conv(8, 8) for _ in range(4)))

    def forward(self, x):
        stem, *blocks = self.body
        x = stem(x)
        if self.how and self.how[1] == 'part of a stage':
            first, blocks = nn.Sequential(*blocks[:2]), blocks[2:]
            return nn.Sequential(*blocks)(
                checkpoint(first, x, use_reentrant=self.how[0])
            )
        for block in blocks:
            x = block(x) if self.how is None else self.run(block, x)
        return x

    def run(self, block, x):
        reentrant, how = self.how
        if how == 'call':
            return checkpoint(block, x, use_reentrant=reentrant)
        return checkpoint(lambda y: block(y), x, use_reentrant=reentrant)


def gradients(network, x, seed=0):
    network.zero_grad()
    torch.manual_seed(seed)
    outs = tensors(network(x))
    sum(out.square().mean() for out in outs).backward()
    return [out.detach() for out in outs], {
        key: param.grad for key, param in network.named_parameters()
    }


def assert_same(one, other):
    for a, b in zip(one[0], other[0]):
        torch.testing.assert_close(a, b)
    assert one[1].keys() == other[1].keys()
    for key, grad in one[1].items():
        assert (grad is None) == (other[1][key] is None), key
        if grad is not None:
            torch.testing.assert_close(grad, other[1][key], rtol=1e-7, atol=1e-9)


def right_or_refused(network, x, expected):
    """Gradients are right, or an error names a block or says what to set."""
    try:
        result = gradients(network, x)
    except (RuntimeError, ValueError) as error:
        blocks = [name[: -len('.layer_attn')] for name in layer_attentions(network)]
        words = ('checkpoint', 'with_cp', *blocks)
        assert any(word in str(error) for word in words), error
    else:
        assert_same(result, expected)


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('how', ['call', 'function', 'part of a stage'])
def test_checkpointed_blocks(attention, reentrant, how):
    torch.manual_seed(0)
    network = Checkpointed()
    config = dict(AFTER_BLOCKS[attention], drop_path=0.0)
    attach_layer_attention(network, config, input_size=(16, 24))
    for seed, module in enumerate(layer_attentions(network).values()):
        stir(module, seed)
    network = network.double().train()
    x = torch.randn(2, 3, 16, 24).double()
    expected = gradients(copy.deepcopy(network), x)
    for pruned in ((), ['body.2.layer_attn']):
        prune(network, pruned)
        expected = gradients(copy.deepcopy(network), x)
        network.how = (reentrant, how)
        right_or_refused(network, x, expected)
        network.how = None


WITH_CP = {
    'mmdet.ResNet': lambda on: toolbox(
        *('mmdet', 'ResNet'), depth=18, base_channels=8, norm_eval=False, with_cp=on
    ),
    'mmpretrain.ResNet': lambda on: toolbox(
        'mmpretrain', 'ResNet', depth=18, base_channels=8, with_cp=on
    ),
    'mmdet.Swin': lambda on: toolbox(
        *('mmdet', 'SwinTransformer'),
        embed_dims=16,
        depths=(2, 2),
        num_heads=(1, 2),
        out_indices=(0, 1),
        strides=(4, 2),
        drop_path_rate=0.0,
        with_cp=on,
    ),
    'mmseg.UNet': lambda on: toolbox('mmseg', 'UNet', base_channels=4, with_cp=on),
    'timm.resnet': lambda on: checkpointing(timm('resnet18', num_classes=2), on),
    'timm.vit': lambda on: checkpointing(timm('test_vit', img_size=64), on),
}


def checkpointing(make, on):
    def made():
        network = make()
        network.set_grad_checkpointing(on)
        return network

    return made


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
@pytest.mark.parametrize('name', WITH_CP)
def test_checkpointing_of_networks(name, attention):
    config = dict(AFTER_BLOCKS[attention], drop_path=0.0)
    networks = []
    for on in (False, True):
        torch.manual_seed(0)
        network = stir(WITH_CP[name](on)())
        attach_layer_attention(network, config, input_size=(64, 64))
        networks.append(network.double())
    one, other = networks
    for seed, module in enumerate(layer_attentions(one).values()):
        stir(module, seed)
    other.load_state_dict(one.state_dict())
    one.train(), other.train()
    x = torch.randn(2, 3, 64, 64).double()
    expected = gradients(one, x)
    right_or_refused(other, x, expected)


# -- gradients ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'attention, name, mode',
    [*itertools.product(AFTER_BLOCKS, ('own.maps', 'own.tokens'), (False, True))],
)
def test_gradients_are_those_of_finite_differences(attention, name, mode):
    network = attached(name, attention, drop_path=0.0).double()
    network.train(mode)
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).double()
    if name == 'own.maps':
        x = x.repeat(1, 1, 2, 2)
    chosen = [p for a in layer_attentions(network).values() for p in a.parameters()]
    inputs = (x.requires_grad_(), *chosen)

    def function(x, *params):
        return tensors(network(x))[0]

    assert torch.autograd.gradcheck(
        function, inputs, fast_mode=True, eps=1e-7, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize('attention', AFTER_BLOCKS)
def test_gradients_of_each_sample_by_torch_func(attention):
    network = attach_layer_attention(
        Checkpointed(), AFTER_BLOCKS[attention], input_size=(16, 24)
    )
    for seed, module in enumerate(layer_attentions(network).values()):
        stir(module, seed)
    network = network.double().eval()
    x = torch.randn(2, 3, 16, 24).double()

    def loss(params, sample):
        out = torch.func.functional_call(network, params, (sample[None],))
        return out.square().mean()

    params = {k: p.detach() for k, p in network.named_parameters()}
    each_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness='same')
    found = each_sample(params, x)
    for index, sample in enumerate(x):
        _, expected = gradients(network, sample[None])
        for key, value in expected.items():
            each = torch.zeros_like(params[key]) if value is None else value
            torch.testing.assert_close(found[key][index], each)
