"""docs/tutorial.ipynb: its code in small, and what is stored of a full run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_code(tmp_path):
    """All cells in order, on 8 images for 2 epochs, with no need for Jupyter."""
    script = tmp_path / 'notebook.py'
    script.write_text('\n'.join(''.join(cell['source']) for cell in CODE), 'utf-8')
    environment = dict(
        os.environ,
        MMELA_TUTORIAL_EPOCHS='2',
        MMELA_TUTORIAL_IMAGES='8',
        MMELA_TUTORIAL_DIR=str(tmp_path / 'work'),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        CUDA_VISIBLE_DEVICES='',
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'Layer attention pruning after epoch 1: 16 -> ' in done.stdout
    assert 'outputs differ by 0' in done.stdout
    assert 'boxes, as many as in PyTorch' in done.stdout
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
