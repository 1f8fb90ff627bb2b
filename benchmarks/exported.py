"""Our backbones as other programs run them, from the ONNX file that `polynext-mm export` writes."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

#: The programs, which are packages.
PROGRAMS = ('onnxruntime', 'openvino')


@functools.cache
def onnx_file(arch: str) -> Path:
    """Return an ONNX file of a backbone from scratch, kept until the process ends."""
    from polynext_mm.backbones import PolyNeXt
    from polynext_mm.deployment import FORMATS, capture, fused, make_network

    backbone = PolyNeXt(arch, out_norm=False)
    network = make_network(SimpleNamespace(backbone=backbone), 'features')
    folder = Path(tempfile.mkdtemp(prefix='benchmark-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f'{arch}.onnx'
    FORMATS['onnx'].write(capture(fused(network)), network, path, {})
    return path


def load(program: str, path: Path, threads: int) -> Callable[[np.ndarray], object]:
    """Return a function that runs an ONNX file on images (B, 3, H, W), in float32.

    Args:
        program: One of :data:`PROGRAMS`.
        path: The file.
        threads: CPU threads.
    """
    if program == 'onnxruntime':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda images: session.run(None, {'images': images})
    import openvino

    settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'}
    return openvino.Core().compile_model(path, 'CPU', settings)
