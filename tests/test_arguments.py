"""Arguments of attentions, policies and hooks: wrong ones are refused by name."""

import inspect
import typing

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmela import attach_layer_attention
from mmela.arguments import arguments_of, check_arguments, nearest_first
from mmela.layers import MRLABase
from mmela.pruning import EBQM, build_policy
from mmela.pruning.registry import PRUNING_POLICIES
from mmela.registry import LAYER_ATTENTIONS
from tests.helpers.toy import ToyNetwork

NAN, INF = float('nan'), float('inf')
# Ten wrong values for each kind of argument, whatever its meaning
WRONG = {
    bool: ['False', 'True', 0, 1, None, 1.0, [], {}, b'True', 'yes'],
    int: ['16', True, False, None, 2.5, [16], {}, NAN, -1, b'1', (1,)],
    float: ['0.5', True, None, [0.5], {}, NAN, INF, -INF, -1.5, 1j, ''],
    str: [1, True, None, ['x'], {}, 'xyz', '', 0.5, b'x', 'Auto '],
    dict: ['BN', 1, True, 0.5, b'x', {1: 2}, {'type': 3}, {'type': 'None'}]
    + [{'tpye': 'BN'}, {'type': 'BN', 'no_such': 1}],
}
PAIRS = ['1-3', 1, True, None, [1], [['a', 2]], [[1, 2, 3]], [[2, 1]], [[0, 1]]]
OTHERS = {
    'windows': [*PAIRS, [[1, 3], [2, 4]]],
    'restart_blocks': ['11', 11, True, None, [1.5], ['11'], [None], {}, [True], 0.5],
    'followers': ['a', 1, True, ['a'], {1: 'a'}, {'a': 1}, {'a': None}, 0.5]
    + [('a', 'b'), {'a': ['b']}],
}
# What is judged later: when weights are drawn, by the model of a run, or not at all,
# as attentions on the branch have no norm of their own
LATER = {
    'init_cfg': lambda value: isinstance(value, dict),
    'module': lambda value: isinstance(value, str),
    'norm_cfg': lambda value: isinstance(value, dict),
}
BASES = dict(
    channels=16,
    head_dim=4,
    reduction=4,
    plugin=dict(type='SqueezeExcitation', reduction=4),
    count=1,
)


def public():
    for registry in (LAYER_ATTENTIONS, PRUNING_POLICIES, HOOKS):
        for cls in registry.module_dict.values():
            if inspect.isclass(cls) and cls.__module__.startswith('mmela.'):
                yield cls


def build(cls, **kwargs):
    if issubclass(cls, Hook):
        known = dict(windows=[(1, 1)]) if 'windows' in arguments_of(cls) else {}
        return HOOKS.build(dict(type=cls.__name__, **{**known, **kwargs}))
    known = {name: BASES[name] for name in arguments_of(cls) if name in BASES}
    return cls(**{**known, **kwargs})


def wrong_values(name, annotation):
    if name in OTHERS:
        return OTHERS[name]
    options = typing.get_args(annotation) or (annotation,)
    (kind,) = [option for option in options if option in WRONG]
    allowed = [None] if type(None) in options else []
    return [value for value in WRONG[kind] if value not in allowed]


@pytest.mark.parametrize('cls', list(public()), ids=lambda cls: cls.__name__)
def test_wrong_values(cls):
    """Each public argument with ten of them."""
    build(cls)
    branch = 'mmela.baselines' in cls.__module__ and cls.__name__ != 'RLAg'
    accepted = []
    for name, annotation in arguments_of(cls).items():
        for value in wrong_values(name, annotation):
            try:
                build(cls, **{name: value})
            except (TypeError, ValueError) as error:
                assert name.rstrip('s') in str(error) and '\n' not in str(error)
                if isinstance(error, TypeError) and 'of type' in str(error):
                    assert f'{cls.__name__}: ' in str(error)
                    assert f'={value!r}' in str(error)
            else:
                later = name in LATER and LATER[name](value)
                if not later or name == 'norm_cfg' and not branch:
                    accepted.append((name, value))
    assert not accepted


@pytest.mark.parametrize('cls', list(public()), ids=lambda cls: cls.__name__)
def test_unknown_names(cls):
    for name in arguments_of(cls):
        typo = f'{name[:-1]}q{name[-1]}'
        with pytest.raises(TypeError) as error:
            build(cls, **{typo: 1})
        says = f'{cls.__name__} has no argument {typo!r} (did you mean {name!r}?)'
        assert says in str(error.value)
        assert str(error.value).endswith(', '.join(arguments_of(cls)))


def test_by_position_too():
    with pytest.raises(TypeError, match="EBQM: gamma='0.5' has type str, but must be"):
        EBQM('0.5')
    with pytest.raises(TypeError, match='MRLABase: channels is given twice'):
        MRLABase(16, channels=16)


def test_the_class_that_was_written():
    """A subclass, and a config, are named by their own names."""

    class Mine(MRLABase):
        def __init__(
            self, channels, strength: 'typing.Optional[float]' = None, **kwargs
        ):
            super().__init__(channels, **kwargs)

    assert isinstance(Mine(32, strength=1), Mine)
    with pytest.raises(TypeError, match=r"Mine has no argument 'strengh' \(did you"):
        Mine(32, strengh=1)
    with pytest.raises(TypeError, match='Mine: strength=True has type bool, but'):
        Mine(32, strength=True)
    with pytest.raises(ValueError, match=r"policy=.*EBQM has no argument 'gama' \(did"):
        build_policy(dict(type='EBQM', gama=0.5))
    with pytest.raises(ValueError, match=r"'EBQN' is unknown \(did you mean 'EBQM'\?"):
        build_policy(dict(type='EBQN'))
    with pytest.raises(ValueError, match=r"criterion='totl' .*did you mean 'total'\?"):
        EBQM(criterion='totl')


def test_before_the_network_is_looked_at():
    """An attention's arguments are judged before a network runs or is changed."""
    network = ToyNetwork()
    with pytest.raises(KeyError, match="'MRLABas' .*did you mean 'MRLABase'"):
        attach_layer_attention(network, dict(type='MRLABas'))
    with pytest.raises(TypeError, match="MRLABase has no argument 'heads_dim'"):
        attach_layer_attention(network, dict(type='MRLABase', heads_dim=4))
    assert not any(hasattr(module, 'layer_attn') for module in network.modules())
    config = dict(type='mmela.WithLayerAttention', backbone=dict(type='ToyNetwork'))
    with pytest.raises(TypeError, match=r"WithLayerAttention has .*'block' \(did you"):
        LAYER_ATTENTIONS.build(dict(config, block='auto'))
    with pytest.raises(TypeError, match="WithLayerAttention: reset_pruning='False'"):
        LAYER_ATTENTIONS.build(dict(config, reset_pruning='False'))


def test_a_constructor_that_takes_anything_is_asked_itself():
    class Open:
        def __init__(self, *args, **kwargs):
            pass

    check_arguments(Open, dict(anything=1))


def test_nearest_first():
    known = ['layer1.0', 'layer2.1', 'backbone.layer3.1']
    assert nearest_first('layer3.1', known)[0] == 'backbone.layer3.1'


@pytest.mark.parametrize(
    'cls', [EBQM, MRLABase, HOOKS.get('LayerAttentionPruningHook')]
)
def test_signature_is_that_of_the_constructor(cls):
    """Help of Python, editors and the reference show it."""
    expected = list(inspect.signature(cls.__init__).parameters)
    assert list(inspect.signature(cls).parameters) == expected[1:]
    assert 'self' not in inspect.signature(cls).parameters
    assert len(expected) > 3
