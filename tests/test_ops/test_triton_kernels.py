import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton')


def test_cases():
    """In a process of its own, as triton reads how to run when imported."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env['TRITON_INTERPRET'] = '1'
    cases = Path(__file__).with_name('triton_cases.py')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', str(cases)],
        capture_output=True,
        text=True,
        env=env,
        cwd=cases.parents[2])
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-3000:]
    # At least those that need no GPU
    assert int(re.search(r'(\d+) passed', result.stdout)[1]) >= 16
