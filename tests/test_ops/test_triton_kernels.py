import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('triton', minversion='3.0')  # the first to interpret


def test_cases():
    """In a process of its own, as triton reads how to run when imported."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env['TRITON_INTERPRET'] = '1'
    cases = Path(__file__).parents[1] / 'helpers' / 'triton_cases.py'
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', str(cases)],
        capture_output=True,
        text=True,
        env=env,
        cwd=cases.parents[2],
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-3000:]
    # At least those that need no GPU
    assert int(re.search(r'(\d+) passed', result.stdout)[1]) >= 16


@pytest.mark.parametrize('dtype', ['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_compiles_for_a_gpu(dtype, channels_last):
    """To machine code of an H100 or H200, which needs no such GPU."""
    compiler = pytest.importorskip('triton.backends.compiler')
    from triton import compile as compile_kernel
    from triton.compiler import ASTSource

    from mmela.ops import triton_kernels as kernels

    pointer = f'*{dtype}'
    sizes = dict(layers='i32', size='i32', channels='i32')
    constants = dict(HEAD_DIM=32, CHANNELS_LAST=channels_last, BLOCK=2048)
    sources = [
        (
            kernels._forward_kernel,
            dict(attn=pointer, values='*i64', out=pointer, **sizes),
            constants,
        ),
        (
            kernels._backward_kernel,
            dict(
                grad=pointer,
                attn=pointer,
                values='*i64',
                grad_values='*i64',
                dots='*fp32',
                **sizes,
            ),
            dict(constants, NEEDS_ATTN=True),
        ),
    ]
    for function, signature, constexprs in sources:
        signature.update({name: 'constexpr' for name in constexprs})
        compiled = compile_kernel(
            ASTSource(function, signature=signature, constexprs=constexprs),
            target=compiler.GPUTarget('cuda', 90, 32),
        )
        assert compiled.asm['cubin']
