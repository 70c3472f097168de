import json
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Union

import torch
from mmengine.utils import digit_version
from torch import nn

from ..attach import input_channels
from ..files import replacing
from .whole import whole_network

# The first version of torch whose exporter supports the calls in this module
_FIRST_WITH_DYNAMO = '2.6.0'


def check_export(path: Union[str, Path], backbone: bool = False) -> None:
    """Check, before any work, that a network can be exported to a file here.

    Args:
        path (str | Path): File to write.
        backbone (bool): Whether to export only a backbone. Defaults to False.

    Raises:
        ImportError: If a package that writes such files is not installed.
        RuntimeError: If torch is too old.
        ValueError: If the file name has an unsupported ending.
    """
    path = Path(path)
    if backbone and path.suffix not in ('.onnx', '.pt'):
        raise ValueError(f'{path} must end with .onnx (ONNX) or .pt (TorchScript)')
    if not backbone and path.suffix not in ('.onnx', '.pt2'):
        raise ValueError(
            f'{path} must end with .onnx (ONNX) or .pt2 (torch.export), or for a '
            'backbone alone with .onnx or .pt (TorchScript)'
        )
    dynamo = digit_version(torch.__version__) >= digit_version(_FIRST_WITH_DYNAMO)
    if not backbone and not dynamo:
        raise RuntimeError(
            f'exporting a whole network needs torch {_FIRST_WITH_DYNAMO} or newer, '
            f'but this is {torch.__version__}; upgrade torch or export the backbone '
            'alone'
        )
    if path.suffix == '.onnx' and dynamo:
        missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
        if missing:
            raise ImportError(
                f'{path} needs {" and ".join(missing)}: pip install "mmela[export]"'
            )


@contextmanager
def _step(text: str, progress: bool) -> Iterator[None]:
    """Print a step and how long it took."""
    start = time.time()
    if progress:
        print(f'{text} ...', end='', flush=True)
    try:
        yield
    finally:
        if progress:
            print(f' {time.time() - start:.0f} s', flush=True)


class _Outputs(nn.Module):
    """A backbone whose outputs are always a tuple."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        outs = self.backbone(x)
        return (outs,) if torch.is_tensor(outs) else tuple(outs)


def export_network(
    model: nn.Module,
    path: Union[str, Path],
    size: Sequence[int] = (320, 416),
    raw: bool = True,
    info: Optional[Dict[str, Any]] = None,
    progress: bool = False,
) -> None:
    """Export a whole classifier or detector as ONNX or as a torch.export program.

    The file includes pre-processing, decoding and non-maximum suppression, but no
    pruned attentions. It takes any batch size and image size.

    Args:
        model (nn.Module): A network of mmpretrain or mmdet on the CPU. This function
            sets it to eval mode. See :mod:`mmela.convert.whole` for the outputs.
        path (str | Path): File to write: ``.onnx`` for ONNX, ``.pt2`` for
            ``torch.export.load``.
        size (Sequence[int]): Height and width in pixels for tracing; choose a size
            close to that of your images. Defaults to (320, 416).
        raw (bool): Take images as loaded, with values 0 to 255 in uint8. Otherwise
            they must be normalized, in float32. Defaults to True.
        info (dict, optional): Further information to store in the file, such as
            class names, as JSON under the name ``mmela``. Defaults to None.
        progress (bool): Print each step and how long it took. Defaults to False.

    Raises:
        ImportError: If a package that writes ONNX is not installed.
        RuntimeError: If torch is too old.
        ValueError: If the file name has another ending, or the network is not
            supported.
    """
    check_export(path)
    path = Path(path)
    network = whole_network(model, raw)
    shape = (2, input_channels(model), *size)
    x = torch.zeros(shape, dtype=torch.uint8 if raw else torch.float32)
    free = torch.export.Dim.DYNAMIC
    text = json.dumps(dict(info or {}, raw=raw, outputs=network.output_names))
    with torch.no_grad(), _frozen(network):
        with _step('Tracing the network', progress):
            shapes = ({0: free, 2: free, 3: free},)
            program = torch.export.export(
                network, (x,), dynamic_shapes=shapes, strict=False
            )
        if path.suffix == '.pt2':
            with _step(f'Writing {path}', progress), replacing(path) as out:
                torch.export.save(program, out, extra_files=dict(mmela=text))
            return
    with _step('Translating it to ONNX', progress):
        onnx_program = torch.onnx.export(
            program,
            (x,),
            input_names=['images'],
            output_names=list(network.output_names),
            dynamo=True,
            verbose=False,
        )
    if hasattr(onnx_program, 'rename_axes'):  # older torch leaves names like s0
        batch, _, height, width = onnx_program.model.graph.inputs[0].shape
        onnx_program.rename_axes({batch: 'batch', height: 'height', width: 'width'})
    onnx_program.model.metadata_props['mmela'] = text
    with _step(f'Writing {path}', progress), replacing(path) as out:
        onnx_program.save(out)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Disable gradients of parameters, which the program would store."""
    trained = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def export_backbone(
    backbone: nn.Module,
    path: Union[str, Path],
    size: Sequence[int] = (224, 224),
    opset: Optional[int] = None,
    progress: bool = False,
) -> None:
    """Export a backbone as ONNX or TorchScript.

    The file has no pruned attentions. It takes any batch size and image size. Before
    torch 2.6, the TorchScript exporter writes ONNX.

    Args:
        backbone (nn.Module): A backbone with inputs (B, C, H, W). This function sets
            it to eval mode.
        path (str | Path): File to write: ``.onnx`` for ONNX, ``.pt`` for
            TorchScript.
        size (Sequence[int]): Height and width to trace with, in pixels.
            Defaults to (224, 224).
        opset (int, optional): ONNX operator set. Defaults to the default of torch.
        progress (bool): Print the step and how long it took. Defaults to False.

    Raises:
        ImportError: If a package that writes ONNX is not installed.
        ValueError: If the file name has another ending.
    """
    check_export(path, backbone=True)
    with _step(f'Writing {path}', progress):
        _write_backbone(backbone, Path(path), size, opset)


def _write_backbone(
    backbone: nn.Module, path: Path, size: Sequence[int], opset: Optional[int]
) -> None:
    # A separate call, because `eval` of some backbones returns None
    backbone.eval()
    model = _Outputs(backbone).eval()
    # Two images, because the exporter takes a size of 1 as a constant
    x = torch.rand(2, input_channels(backbone), *size)
    if path.suffix == '.pt':
        with torch.no_grad(), replacing(path) as out:
            torch.jit.trace(model, x, check_trace=False).save(str(out))
        return
    with torch.no_grad():
        names = [f'out{i}' for i in range(len(model(x)))]
    options = dict(input_names=['x'], output_names=names, opset_version=opset)
    if digit_version(torch.__version__) < digit_version(_FIRST_WITH_DYNAMO):
        # The exporter below is missing there, or takes other arguments.
        free = {0: 'batch', 2: 'height', 3: 'width'}
        axes = {name: free for name in ('x', *names)}
        with replacing(path) as out:
            torch.onnx.export(model, (x,), str(out), dynamic_axes=axes, **options)
        return
    batch = torch.export.Dim('batch', min=1)
    height = torch.export.Dim('height', min=32)
    width = torch.export.Dim('width', min=32)
    program = torch.onnx.export(
        model,
        (x,),
        dynamic_shapes=dict(x={0: batch, 2: height, 3: width}),
        dynamo=True,
        verbose=False,
        **options,
    )
    with replacing(path) as out:
        program.save(out, external_data=False)
