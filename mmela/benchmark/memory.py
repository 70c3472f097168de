"""Measure the peak memory of one step.

Memory in use before the step (parameters, buffers, optimizer state, batch) is counted
by storages. The increase during the step is measured: on a GPU by torch's allocator, on
a CPU by torch's profiler, which records every allocation and release of tensor memory,
including temporaries of operators. Both count bytes of tensors, but neither the
reserve of an allocator nor the scratch space of a CPU library.
"""

import gc
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Number of bytes of tensors; shared memory counts once.

    Args:
        tensors (Iterable[Tensor]): Tensors.

    Returns:
        int: Number of bytes.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Iterate over tensors in nested dicts, sequences and data samples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, 'all_values'):  # BaseDataElement of mmengine
        yield from tensors_in(list(value.all_values()))


def peak_rise(step: Callable[[], object], device: torch.device) -> int:
    """Measure by how many bytes a step exceeds the memory in use before it.

    Args:
        step (callable): The step. It must not release memory that was in use before,
            such as gradients of the previous step.
        device (torch.device): Its device, CPU or GPU.

    Returns:
        int: Number of bytes at the peak.
    """
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    # Silence the profiler's log of each start and stop
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a second profile warns about the first one
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    events = [e for e in events if e.get('name') == '[memory]']
    alive = peak = 0
    for event in sorted(events, key=lambda e: e['ts']):
        alive += event['args']['Bytes']
        peak = max(peak, alive)
    return peak
