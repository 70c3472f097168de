from mmela.command_line import printable
from mmela.engine.tables import decision_table, text_table
from mmela.pruning import LayerDecision


def cells(text):
    lines = text.splitlines()
    return [[c.strip() for c in line.split('|')[1:-1]] for line in lines][2:]


def test_text_is_shown_as_it_is():
    """Neither markup nor what a terminal would obey."""
    reason = 'pruned: in [/0.1, 0.2] [bold]\x1b[31m\nred'
    layer = LayerDecision('layer1.0.layer_attn', 'layer1', 0.25, reason=reason)
    ((name, kl, *_, found),) = cells(decision_table([layer]))
    assert (name, kl) == ('layer1.0', '0.25')
    assert found == r'pruned: in [/0.1, 0.2] [bold]\x1b[31m\nred'


def test_no_colours_that_the_environment_asks_for(monkeypatch):
    """Jupyter does; the text also goes to a file."""
    monkeypatch.setenv('FORCE_COLOR', '1')
    assert '\x1b' not in text_table(['a'], [['b']])


def test_printable():
    assert printable('KL ✕ 0.1') == 'KL ✕ 0.1'
    assert printable('\x07\x9b\u202e') == r'\x07\x9b\u202e'
