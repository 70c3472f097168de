"""Reading a study file."""

import pytest

from mmela.studies.study import Start, flatten, read_study
from tests.helpers.studies import CONFIG, write_study

PLAIN = dict(config='tiny.py')


def test_reads(tmp_path):
    start = dict(variant='plain', checkpoint='epoch_1.pth', how='load')
    path = write_study(
        tmp_path,
        options={'factor': 7, 'die_at': 5},
        variants=dict(
            plain=dict(PLAIN, hidden=True),
            ela=dict(
                PLAIN,
                label='ELA',
                options={'custom_hooks.0': {'policy': {'gamma': 0.3}}, 'factor': 8},
                start=start,
                paper=75,
            ),
            windows=dict(
                PLAIN,
                options={'custom_hooks.0.windows': [[1, 2], [5, 5]], 'factor': '(1,2)'},
            ),
        ),
        compare=[['ela', 'windows']],
        prepare=['python make.py'],
    )
    study = read_study(path, {'die_at': 8})
    assert study.seeds == (0, 1) and study.prepare == ('python make.py',)
    assert study.compare == (('ela', 'windows'),)
    plain, ela, windows = study.variants.values()
    assert plain.hidden and plain.label == 'plain' and plain.start is None
    assert ela.label == 'ELA' and ela.paper == 75
    assert ela.start == Start('plain', 'epoch_1.pth', 'load')
    # Of all variants, of this one, of the command line: the last counts
    assert ela.options == (
        'randomness.deterministic=True',
        'factor=8',
        'die_at=8',
        'custom_hooks.0.policy.gamma=0.3',
    )
    assert ela.settings['factor'] == 8 and plain.settings['factor'] == 7
    assert ela.settings['custom_hooks'][0]['policy'] == {'gamma': 0.3}
    assert windows.options[-1] == 'custom_hooks.0.windows=[[1,2],[5,5]]'
    assert windows.settings['factor'] == [1, 2]  # as JSON has a tuple
    assert windows.settings['custom_hooks'][0]['windows'] == [[1, 2], [5, 5]]
    assert (ela.unit, ela.length) == ('epoch', 3)


def test_iterations(tmp_path):
    config = CONFIG.replace('by_epoch=True, max_epochs=3', 'max_iters=500')
    variant = read_study(write_study(tmp_path, config)).variants['plain']
    assert (variant.unit, variant.length) == ('iter', 500)


def start(variant='plain', checkpoint='epoch_1.pth', how='load', **kwargs):
    content = dict(variant=variant, checkpoint=checkpoint, how=how)
    return dict(PLAIN, start=content, **kwargs)


@pytest.mark.parametrize(
    'changes, names',
    [
        (dict(seed=[0]), ["'seed'", 'seeds']),
        (dict(metric=None), ['metric']),
        (dict(metric=3), ['metric', '3']),
        (dict(name='a/b'), ["'a/b'"]),
        (dict(seeds=[0, 1, 0]), ['[0, 1, 0]', 'twice']),
        (dict(seeds=[]), ['[]']),
        (dict(seeds=[0, True]), ['True']),
        (dict(seeds=[-1]), ['-1']),
        (dict(prepare=[['ls']]), ['ls']),
        (dict(variants={}), ['variants']),
        (dict(variants={'a b': PLAIN}), ["'a b'"]),
        (dict(variants={'a': 'tiny.py'}), ['a', 'tiny.py']),
        (dict(variants={'a': {}}), ['a', 'config']),
        (dict(variants={'a': dict(config='no.py')}), ['a', 'no.py']),
        (dict(variants={'a': dict(PLAIN, hide=True)}), ["'hide'", 'hidden']),
        (dict(variants={'a': dict(PLAIN, hidden=1)}), ['hidden=1', 'bool']),
        (dict(variants={'a': dict(PLAIN, paper=True)}), ['paper=True']),
        (dict(variants={'a': start()}, compare=[]), ["'plain'", ' a']),
        (dict(variants={'a': start('a')}, compare=[]), ['a <- a']),
        (
            dict(variants={'a': start('b'), 'b': start('a')}, compare=[]),
            ['a <- b <- a'],
        ),
        (
            dict(variants={'plain': PLAIN, 'a': start(how='copy')}, compare=[]),
            ["'copy'", 'resume', 'load'],
        ),
        (
            dict(variants={'plain': PLAIN, 'a': start(checkpoint='b/c')}, compare=[]),
            ["'b/c'"],
        ),
        (
            dict(
                variants={'plain': PLAIN, 'a': start(checkpoint='epoch_4.pth')},
                compare=[],
            ),
            ['epoch_4.pth', 'epoch_1.pth, epoch_2.pth, epoch_3.pth'],
        ),
        (dict(compare=[['plain', 'ela']]), ["'ela'", 'plain, other']),
        (dict(compare=[['plain', 'plain']]), ["['plain', 'plain']"]),
        (dict(compare=['plain']), ["'plain'"]),
        (
            dict(variants={'a': dict(PLAIN, hidden=True), 'b': PLAIN},
                 compare=[['b', 'a']]),
            ["'a'", 'b'],
        ),
        (dict(options={'randomness.seed': 3}), ['randomness.seed']),
        (dict(options={'custom_hook.0.policy': 3}), ["'custom_hook'"]),
        (dict(options={'custom_hooks.1.policy.gamma': 3}), ["'1'"]),
        (dict(options={'custom_hooks.0.polcy.gamma': 3}), ["'polcy'"]),
        # The command line reads it as a list
        (dict(options={'custom_hooks.0.name': 'a,b'}), ['custom_hooks.0.name', 'a,b']),
    ],
)  # yapf: disable
def test_refuses(tmp_path, changes, names):
    path = write_study(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        read_study(path)
    text = str(error.value)
    assert text.startswith(f'{path}: ') and '\n' not in text
    for name in names:
        assert name in text


def test_what_is_no_longer_there(tmp_path):
    """Of three checkpoints, a run keeps the last two."""
    config = CONFIG.replace('interval=1', 'interval=1, max_keep_ckpts=2')
    variants = {'plain': PLAIN, 'a': start(checkpoint='epoch_2.pth')}
    read_study(write_study(tmp_path, config, variants=variants, compare=[]))
    variants['a'] = start(checkpoint='epoch_1.pth')
    with pytest.raises(ValueError, match='only keeps epoch_2.pth, epoch_3.pth'):
        read_study(write_study(tmp_path, config, variants=variants, compare=[]))


@pytest.mark.parametrize(
    'config, name',
    [
        ('1 / 0', 'ZeroDivisionError'),
        ('train_cfg = dict()', 'max_epochs'),
        ('model = dict(', 'SyntaxError'),
        ('_base_ = "no.py"', 'no.py'),
    ],
)
def test_configs_that_do_not_load(tmp_path, config, name):
    with pytest.raises(ValueError, match=name):
        read_study(write_study(tmp_path, config))


@pytest.mark.parametrize('text', ['[1, 2]', 'name: a: b', '', 'name: [\n'])
def test_what_is_no_study(tmp_path, text):
    (tmp_path / 'a.yml').write_text(text)
    with pytest.raises(ValueError, match='a.yml'):
        read_study(tmp_path / 'a.yml')


def test_a_variant_twice(tmp_path):
    """yaml would take the second."""
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace('other:', 'plain:', 1))
    with pytest.raises(ValueError, match="'plain' twice"):
        read_study(path)


def test_flatten():
    nested = {'a': {'b': [1, {'c': 2}]}, 'd': [], 'e': {}}
    assert flatten(nested) == {'a.b.0': 1, 'a.b.1.c': 2, 'd': [], 'e': {}}
    assert flatten(nested, lists=False)['a.b'] == [1, {'c': 2}]
    assert flatten({}) == {}


def test_shipped_studies(config_dir):
    """Each loads, and its configs and comparisons are there."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    paths = sorted((config_dir / 'studies').glob('*.yml'))
    assert len(paths) > 4
    for path in paths:
        assert read_study(path).name == path.stem
