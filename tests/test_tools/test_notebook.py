"""docs/tutorial.ipynb: its code in small, and what is stored of a full run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fresh

pytest.importorskip('mmdet')
pytest.importorskip('mmcv.ops', exc_type=ImportError)
pytest.importorskip('onnxruntime')
pytest.importorskip('safetensors')

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / 'docs' / 'tutorial.ipynb'
CODE = [
    cell
    for cell in json.loads(NOTEBOOK.read_text('utf-8'))['cells']
    if cell['cell_type'] == 'code'
]


def run_command(command, **kwargs):
    """What the notebook has of ``subprocess.run``, but with a start of its own."""
    assert command[:3] == [sys.executable, '-m', 'mmela']
    done = fresh.run(fresh.module('mmela'), *command[3:], cwd=os.getcwd())
    return subprocess.CompletedProcess(command, *done)


def test_code(tmp_path, monkeypatch, capsys):
    """All cells in order, on 8 images for 2 epochs, with no need for Jupyter."""
    monkeypatch.setenv('MMELA_TUTORIAL_EPOCHS', '2')
    monkeypatch.setenv('MMELA_TUTORIAL_IMAGES', '8')
    monkeypatch.setenv('MMELA_TUTORIAL_DIR', str(tmp_path / 'work'))
    monkeypatch.setattr(subprocess, 'run', run_command)
    monkeypatch.chdir(tmp_path)  # back from where the notebook goes
    exec('\n'.join(''.join(cell['source']) for cell in CODE), {})
    output = capsys.readouterr().out
    assert 'Layer attention pruning after epoch 1: 16 -> ' in output
    assert 'outputs differ by 0' in output
    assert 'boxes, as many as in PyTorch' in output
    report = json.loads((tmp_path / 'work/run/pruning.json').read_text())
    assert [d['window'] for d in report['decisions']] == [[1, 1], [2, 2]]
    assert (tmp_path / 'work/detector.onnx').stat().st_size > 2**20


def test_stored_outputs():
    """They are of one run from the first cell to the last, without an error."""
    assert [cell['execution_count'] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell['outputs']]
    assert all(output['output_type'] != 'error' for output in outputs)
    pictures = [o for o in outputs if 'image/' in ' '.join(o.get('data', {}))]
    assert len(pictures) == 3
    text = NOTEBOOK.read_text('utf-8')
    assert '\\u001b' not in text  # a raw escape is lost when code is copied
    assert len(text) < 250_000
    for path in ('/root', '/tmp', '/home', '/work/', str(ROOT)):
        assert path not in text
