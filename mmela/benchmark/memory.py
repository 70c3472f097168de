"""Peak memory of one step.

What is alive before the step (parameters, buffers, state of the optimizer,
batch) is counted by its storages. What the step adds at its peak is measured:
on a GPU by torch's allocator, on a CPU by torch's profiler, which records each
allocation and release of a tensor's memory, temporaries of operators included.
Both are bytes of tensors: not what allocators hold in reserve, nor scratch
space that a CPU library allocates for itself.
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
    """Bytes that tensors take, memory that they share counted once.

    Args:
        tensors (Iterable[Tensor]): Tensors.

    Returns:
        int: Bytes.
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors in nested dicts and sequences, and in data samples."""
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
    """Bytes that a step takes at its peak beyond what is alive before it.

    Args:
        step (callable): The step. Nothing that it releases may be alive
            before it, e.g. no gradients of the step before.
        device (torch.device): Where it runs, CPU or GPU.

    Returns:
        int: Bytes.
    """
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    # The profiler's own log has a line for each start and stop
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of what a second profile forgets
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
