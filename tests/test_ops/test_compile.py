"""backend='compile': what the eager attention gives, in as few graphs as can be.

But for one test, the compiler makes graphs and no machine code, which takes minutes.
"""

import copy
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmela.layers import (
    MLA,
    AttentionState,
    AttnRes,
    DLABase,
    LinearizedMLA,
    MRLABase,
)
from mmela.ops import compile as module
from tests.helpers.runs import HOOK, states
from tests.helpers.stages import BlockStage
from tests.helpers.toy import toy_config, train

pytestmark = pytest.mark.skipif(
    not hasattr(torch, 'compiler'), reason='torch 2.0: always eager'
)
C, D, DEPTH = 8, 4, 10  # more blocks than graphs that torch keeps of one function
PRUNED, VALUE_ONLY = AttentionState.PRUNED, AttentionState.VALUE_ONLY
KINDS = {
    'MRLABase': (MRLABase, {}),
    'no norm': (MRLABase, dict(norm_cfg=None)),
    'GN': (MRLABase, dict(norm_cfg=dict(type='GN', num_groups=2))),
    'activated': (MRLABase, dict(value_act_cfg=dict(type='ReLU'), fc_reduction=2)),
    'MLA': (MLA, {}),
    'DLABase': (DLABase, dict(reduction=2)),
    'linear': (LinearizedMLA, dict(kind='linear')),
    'AttnRes': (AttnRes, dict(heads=2, total='sum')),
    'AttnRes-groups': (AttnRes, dict(per='image', every=2, norm_weight=True)),
}


class Graphs:
    """Counts the graphs that are compiled."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    graphs = Graphs()
    torch._dynamo.reset()
    monkeypatch.setattr(module, 'COMPILER', graphs)
    monkeypatch.setattr(module, '_failed', [])
    return graphs


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()  # does not propagate
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def make(backend, kind='MRLABase', depth=3):
    cls, kwargs = KINDS[kind]
    torch.manual_seed(0)
    blocks = [nn.Conv2d(C, C, 3, padding=1) for _ in range(depth)]
    stage = BlockStage(*blocks)
    for i in range(depth):
        if cls is DLABase and i:
            kwargs = dict(kwargs, owns_shared=False)
        own = dict(block=i) if cls is AttnRes else dict(head_dim=D)
        attention = cls(C, backend=backend, **own, **kwargs)
        stage.attach(i, attention)
        query = getattr(attention.query, 'weight', attention.query)
        if query is not None:
            nn.init.normal_(query, std=3)
    return stage.double()


def images(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, C, 6, 5)), generator=generator).double()


def step(stage, x=None, run=None):
    """Output, gradients, buffers and observed scores of one step."""
    scores = []
    stage.observer = lambda found: scores.extend(found)
    stage.zero_grad()
    x = (images() if x is None else x).clone().requires_grad_()
    out = (run or stage)(x)
    out.square().mean().backward()
    # Where nothing is had of a parameter, a graph gives 0 for its gradient
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in stage.named_parameters()
        if p.requires_grad
    }
    buffers = {n: b.clone() for n, b in stage.named_buffers()}
    return [out, x.grad, gradients, scores, buffers]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    'kind, compiler', [*((k, 'graphs') for k in KINDS), ('MRLABase', 'aot_eager')]
)
def test_as_eager(kind, compiler, graphs, monkeypatch):
    """In training and evaluation, as attentions are pruned one after the other."""
    if compiler != 'graphs':
        monkeypatch.setattr(module, 'COMPILER', compiler)
    stages = [make(backend, kind) for backend in ('compile', 'auto')]
    for block, state in ((None, None), (1, VALUE_ONLY), (0, PRUNED)):
        for stage in stages:
            if block is not None:
                stage[block].layer_attn.attention_state = state
        same(*(step(stage.train()) for stage in stages))
        with torch.no_grad():
            same(*(stage.eval()(images()) for stage in stages))
    assert not module._failed
    assert compiler != 'graphs' or graphs.count > 6


@pytest.mark.skipif(
    not shutil.which(os.environ.get('CXX', 'g++')),
    reason='needs a C++ compiler: g++, or what CXX names',
)
def test_machine_code(monkeypatch):
    monkeypatch.setattr(module, 'COMPILER', 'inductor')
    same(*(step(make(backend, depth=2)) for backend in ('compile', 'auto')))
    assert not module._failed


def test_graphs_of_two_decisions(graphs):
    """One graph for each attention, and one more where tokens are fewer."""
    stage, eager = make('compile', depth=DEPTH), make('auto', depth=DEPTH)
    expected = DEPTH
    for gone in (None, 2, 5):
        if gone is not None:
            for s in (stage, eager):
                s[gone].layer_attn.attention_state = PRUNED
            expected += sum(a.active for a in stage.attentions[gone:])
        for _ in range(3):
            same(step(stage), step(eager))
        assert graphs.count == expected


def test_sizes_of_images_share_a_graph(graphs):
    stage, eager = make('compile'), make('auto')
    for shape in ((2, 6, 5), (2, 7, 9), (3, 8, 4), (4, 5, 11), (5, 9, 10)):
        x = images(shape[0], C, *shape[1:])
        same(step(stage, x), step(eager, x))
    assert graphs.count <= 3 * 3  # one fixed, and at most two while it learns


def test_training_and_evaluation_by_turns(graphs):
    stage = make('compile')
    counts = []
    for _ in range(3):
        step(stage.train())
        with torch.no_grad():
            stage.eval()(images())
        counts.append(graphs.count)
    assert counts == [6, 6, 6]


# -- without a compiler --------------------------------------------------------


def no_compiler(graph, inputs):
    raise OSError('no compiler at hand')


@pytest.mark.parametrize('fault', ['backend', 'torch.compile', 'torch 2.0', 'C++'])
def test_without_a_compiler(fault, monkeypatch, log):
    """Eager, and one line says so."""
    if fault == 'backend':
        monkeypatch.setattr(module, 'COMPILER', no_compiler)
    elif fault == 'torch 2.0':
        monkeypatch.setattr(module, 'TOO_OLD', True)
    elif fault == 'C++':
        config = pytest.importorskip('torch._inductor.config')
        monkeypatch.setattr(module, 'COMPILER', 'inductor')
        monkeypatch.setattr(config.cpp, 'cxx', ('no-such-compiler',))
        monkeypatch.setattr(config, 'fx_graph_cache', False, raising=False)
        for name in ('get_cpp_compiler', 'cpp_compiler_search'):
            with_cache = getattr(torch._inductor.cpp_builder, name, None)
            if hasattr(with_cache, 'cache_clear'):
                with_cache.cache_clear()
    else:

        def refuse(*args, **kwargs):
            raise RuntimeError('Windows not yet supported for torch.compile')

        monkeypatch.setattr(torch, 'compile', refuse)
    stages = [make(backend) for backend in ('compile', 'auto')]
    for _ in range(2):
        same(*map(step, stages))
    lines = [r.getMessage() for r in log.records if 'compile' in r.getMessage()]
    assert len(lines) == 1 and '\n' not in lines[0]
    assert lines[0].startswith("backend='compile' fails on 'cpu'")
    assert len(lines[0]) < 300


def test_errors_of_a_run_are_errors():
    stage = make('compile')
    with pytest.raises((RuntimeError, ValueError)):
        stage(images(2, 3, 6, 5))
    attention = stage[0].layer_attn
    with pytest.raises((RuntimeError, ValueError)):
        attention(images(2, C + 1, 6, 5), attention.Memory())
    assert attention(images(), attention.Memory()).shape == images().shape


def test_an_old_config(graphs):
    with pytest.warns(UserWarning, match="'triton' no longer exists; using 'compile'"):
        attention = MRLABase(C, head_dim=D, backend='triton')
    assert attention.backend == 'compile'
    attention(torch.randn(1, C, 3, 3), attention.Memory())
    assert graphs.count == 1


# -- with what else there is ----------------------------------------------------


@pytest.mark.parametrize('part', ['', 'norm', 'value', 'key'])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_hooks_run(part, when):
    stage = make('compile')
    attention = stage[1].layer_attn
    seen = []
    if when == 'after':
        step(stage)
    handle = attention.get_submodule(part).register_forward_hook(
        lambda *args: seen.append(1)
    )
    found = step(stage)
    assert seen == [1]
    handle.remove()
    step(stage)
    assert seen == [1]
    eager = make('auto')
    if when == 'after':
        step(eager)
    same(found, step(eager))


def test_after_inference_mode(graphs):
    stage, eager = make('compile'), make('auto')
    for s in (stage, eager):
        with torch.inference_mode():
            s(images())
    same(step(stage), step(eager))
    assert graphs.count == 6


def test_threads(graphs):
    """One network, used by several at once."""
    stage = make('compile').eval()
    xs = [images(2, C, 5, 4 + i % 2) * i for i in range(1, 9)]

    def run(x):
        with torch.no_grad():
            return stage(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, xs))
    with torch.no_grad():
        same(found, list(map(make('auto').eval(), xs)))


def test_on_no_device(graphs):
    stage = make('compile').to('meta')
    assert stage(images().to('meta')).shape == images().shape
    assert graphs.count == 0 and not module._failed


def test_copies_run_their_own_weights():
    stage = make('compile')
    step(stage)
    stage.observer = None  # a lambda
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        expected = make('auto')
        expected.load_state_dict(stage.state_dict())
        with torch.no_grad():
            for s in (other, expected):
                s[1].layer_attn.value.weight.mul_(2)
        same(step(other)[:3], step(expected)[:3])


def test_a_network_that_is_compiled_as_a_whole(graphs):
    stage = make('compile')
    whole = torch.compile(stage, backend=graphs, fullgraph=True)
    same(step(stage, run=whole)[:3], step(make('auto'))[:3])
    assert graphs.count == 1


def test_trace_and_flops(graphs):
    stage = make('compile').eval()
    traced = torch.jit.trace(stage, images(), check_trace=False)
    assert graphs.count == 0
    same(traced(images()), make('auto').eval()(images()))
    counts = []
    for backend in ('compile', 'auto'):
        with FlopCounterMode(display=False) as counter:
            make(backend).eval()(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_exported():
    export = pytest.importorskip('torch.export')
    stage = make('compile').eval()
    program = export.export(stage, (images(),))
    same(program.module()(images()), make('auto').eval()(images()))


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointed(reentrant, monkeypatch):
    """A stage as a whole, whose second forward pass is cut short."""
    monkeypatch.setattr(module, 'COMPILER', 'aot_eager')

    def results(backend):
        stage = make(backend)
        return step(stage, run=lambda x: checkpoint(stage, x, use_reentrant=reentrant))[
            :3
        ]

    same(results('compile'), results('auto'))
    assert not module._failed


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, monkeypatch):
    monkeypatch.setattr(module, 'COMPILER', 'aot_eager')
    results = []
    for backend in ('compile', 'reference'):
        stage = make(backend).float()
        with torch.autocast('cpu', dtype):
            results.append(step(stage, images().float()))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert {s.dtype for s in results[0][3]} == {torch.float32}


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    for key in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(key, '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('distributed', [False, True])
def test_run_with_prunings(distributed, request, tmp_path, monkeypatch, graphs):
    """The same decisions and weights as eagerly, also under DDP."""
    settings = {}
    if distributed:
        request.getfixturevalue('one_process')
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        settings = dict(launcher='pytorch', model_wrapper_cfg=wrapper)
    runs = []
    for backend in ('compile', 'auto'):
        config = toy_config(tmp_path / backend, HOOK, **settings)
        config['model']['layer_attention']['backend'] = backend
        runs.append(train(config))
    assert graphs.count > 0 and not module._failed
    assert states(runs[0].model) == states(runs[1].model)
    assert any(states(runs[0].model).values())
    for found, expected in zip(*(r.model.state_dict().values() for r in runs)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
