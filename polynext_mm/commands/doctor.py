"""Say what is installed and what works here: ``polynext-mm doctor [CONFIG [CHECKPOINT]]``.

The output is meant to be pasted into a bug report. Exit code 1 means that something is broken; the
report then shows the one command that fixes it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from polynext_mm.resources import find_config, folder
from polynext_mm.runs import find_checkpoint

if TYPE_CHECKING:
    from torch import nn

# the smallest network with both mixers
_TINY = dict(
    widths=(8, 16, 16, 24),
    depths=(1, 1, 1, 1),
    stacks=(1, 1, 1, 1),
    mixers=('conv', 'conv', 'attn', 'attn'),
    conv_ratios=(1, 1, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
    coarse_sizes=(3, 3, 3, 3),
    downsampling=('sep3x3', 'full3x3'),
    gate_init=(0, 0, 0),
)
_OPTIONAL = {
    'timm': 'the peers (ConvFormer, CAFormer) and PolyNeXt as a model of timm',
    'matplotlib': '`polynext-mm plot`, and the report of a training',
    'tensorboard': "TensorBoard as one of the config's vis_backends",
}
_MM_MODULES = ('mmengine', 'mmcv', 'mmseg', 'mmdet')
# packages whose names differ from their modules
_DISTRIBUTIONS = {
    'cv2': 'opencv-python-headless',
    'PIL': 'pillow',
    'pkg_resources': "'setuptools<81'",
    'skimage': 'scikit-image',
    'yaml': 'PyYAML',
}


@dataclass(frozen=True)
class Check:
    """A check and its result.

    Args:
        name: What was tried.
        state: 'ok', 'note' if something optional is missing, or 'FAIL'.
        text: What was found.
        remedy: The one command or setting that helps, if something is missing.
    """

    name: str
    state: str
    text: str
    remedy: str = ''


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='polynext-mm doctor',
        description='Say what is installed and what works; for bug reports. Exit code 1 if '
        'something is broken',
    )
    parser.add_argument(
        'config', nargs='?', help='a config, or a work dir, whose model is built, too'
    )
    parser.add_argument('checkpoint', nargs='?', help='a checkpoint that must fit the config')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    failed = False
    for title, rows in (('machine', machine()), ('packages', packages()), ('devices', devices())):
        print(title)
        for name, value in rows:
            print(f'  {name:<24}{value}')
    print('checks')
    for check in _checks(args):
        print(f'  {check.state:<5} {check.name:<22}{check.text}', flush=True)
        if check.remedy:
            print(f'        -> {check.remedy}')
        failed = failed or check.state == 'FAIL'
    print('something is broken: see FAIL above' if failed else 'all works')
    return 1 if failed else 0


def _checks(args: argparse.Namespace) -> Iterator[Check]:
    for name, check in CHECKS.items():
        yield _tried(name, check)
    if args.config is not None:
        yield from check_model(args.config, args.checkpoint)


def _tried(name: str, check: Callable[[], Check]) -> Check:
    """Run a check, hiding what mm prints; an error becomes its result."""
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter('ignore')
            return check()
    except Exception as error:  # any error of this installation is a finding
        return Check(name, 'FAIL', _one_line(error), _remedy(error))


def _remedy(error: Exception) -> str:
    """Return the command that fixes a failed import; '' if the error itself names it."""
    if 'libGL' in str(error):
        return (
            'pip uninstall -y opencv-python && '
            'pip install --force-reinstall --no-deps opencv-python-headless'
        )
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ''
    module = error.name.partition('.')[0]
    if module in _MM_MODULES:  # there are two incompatible sets of them
        return ''
    return f'pip install {_DISTRIBUTIONS.get(module, module)}'


def _one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


# What is here


def machine() -> Iterator[tuple[str, str]]:
    yield 'python', f'{platform.python_version()}, {sys.executable}'
    yield 'system', platform.platform()
    yield 'processor', f'{platform.machine()}, {os.cpu_count()} cores'
    yield 'C++ compiler', _compiler() or 'none'


def _compiler() -> str | None:
    """Return the version line of the compiler that torch.compile uses."""
    for name in (os.environ.get('CXX', 'g++'), 'clang++'):
        path = shutil.which(name)
        if path:
            return f'{_first_line(path, "--version")} ({path})'
    return None


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return _one_line(error)
    return done.stdout.strip().partition('\n')[0]


def packages() -> Iterator[tuple[str, str]]:
    from polynext_mm import __version__
    from polynext_mm.compat import stack_name

    where = Path(__file__).parents[1]
    kind = 'clone' if folder('configs').parent != where else 'wheel'
    yield 'polynext_mm', f'{__version__}, {kind} at {where}'
    for name in ('torch', 'torchvision', 'numpy', 'safetensors'):
        yield name, _version(name)
    yield 'mm packages', stack_name() or 'none'
    for name in _MM_MODULES:
        yield name, _version(name)
    for name in ('timm', 'triton', 'matplotlib', 'tensorboard', 'wandb', 'onnxruntime', 'openvino'):
        yield name, _version(name)
    for name in ('opencv-python', 'opencv-python-headless'):
        if (version := _distribution(name)) is not None:
            yield name, version


def _version(module: str) -> str:
    """Return the version of the imported module, which metadata on the path may contradict."""
    if importlib.util.find_spec(module) is None:
        return 'not installed'
    try:
        return str(getattr(importlib.import_module(module), '__version__', 'of unknown version'))
    except Exception as error:
        return f'cannot be imported: {_one_line(error)}'


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except Exception as error:
        yield 'torch', _one_line(error)
        return
    yield 'cpu', f'{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
    built = torch.version.cuda or torch.version.hip
    yield 'built for', f'{"ROCm" if torch.version.hip else "CUDA"} {built}' if built else 'CPU'
    if shutil.which('nvidia-smi'):
        query = ('--query-gpu=driver_version', '--format=csv,noheader')
        yield 'driver', _first_line('nvidia-smi', *query)
    if not torch.cuda.is_available():
        yield 'gpu', 'none that torch can use'
        return
    yield 'cudnn', str(torch.backends.cudnn.version())
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip
        yield (
            f'cuda:{index}',
            f'{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, '
            f'bf16 {"yes" if bf16 else "no"}',
        )


# What works


def check_installation() -> Check:
    """Check that only one set of mm packages is installed in one place."""
    from polynext_mm.compat import check_stack, stack_name
    from polynext_mm.compat.packages import stacks_in_one_place

    check_stack()
    for place in stacks_in_one_place():
        return Check(
            'mm packages',
            'FAIL',
            f'both sets are installed in {place} and overwrite each other',
            'pip uninstall -y onedl-mmengine onedl-mmcv onedl-mmsegmentation onedl-mmdetection '
            'mmengine mmcv mmcv-lite mmsegmentation mmdet, and install one set again',
        )
    return Check('mm packages', 'ok', f'one set: {stack_name()}')


def check_torch() -> Check:
    """List the features that this version of torch lacks."""
    import torch

    from polynext_mm.compat.torch_features import OPTIONAL

    missing = [feature for feature in OPTIONAL if not feature.is_there]
    if not missing:
        return Check('torch', 'ok', f'{torch.__version__} has all that is asked for')
    listed = ', '.join(f'{feature.name} (torch {feature.since})' for feature in missing)
    return Check(
        'torch', 'note', f'{torch.__version__} trains, tests and predicts; it lacks {listed}'
    )


def check_networks() -> Check:
    """Run a tiny network from the registry forward and backward on every device."""
    import torch
    from mmengine.registry import MODELS

    import polynext_mm  # noqa: F401 - registers
    from polynext_mm.compat.torch_features import autocast

    done = []
    places = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    for place in places:
        network = MODELS.build(dict(type='PolyNeXt', arch=_TINY)).to(place)
        for dtype in (torch.float32, torch.bfloat16):
            name = f'{place} {str(dtype).removeprefix("torch.")}'
            with autocast(place.partition(':')[0], dtype):
                outs = network(torch.randn(2, 3, 64, 64, device=place))
            sum(out.float().square().mean() for out in outs).backward()
            grads = [param.grad for param in network.parameters() if param.grad is not None]
            if not all(grad.isfinite().all() for grad in grads):
                return Check('networks', 'FAIL', f'gradients on {name} are not finite')
            network.zero_grad()
            done.append(name)
    return Check('networks', 'ok', f'forward and backward: {", ".join(done)}')


def check_segmentation() -> Check:
    from polynext_mm.compat import check_stack

    check_stack(['mmseg'])
    importlib.import_module('polynext_mm.backbones')
    importlib.import_module('mmseg.apis')
    return Check('segmentation', 'ok', 'mmseg is there')


def check_detection() -> Check:
    import torch

    from polynext_mm.compat import check_stack

    check_stack(['mmdet'])
    importlib.import_module('polynext_mm.backbones')
    importlib.import_module('mmdet.apis')
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    _, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    if kept.tolist() != [0, 2]:
        return Check('detection', 'FAIL', f'mmcv.ops.nms keeps {kept.tolist()} instead of [0, 2]')
    return Check('detection', 'ok', 'mmdet is there, nms of mmcv.ops is right')


def check_operators() -> Check:
    from polynext_mm.compat import check_stack, install_mmcv_ops
    from polynext_mm.compat.packages import how_to_compile_mmcv
    from polynext_mm.compat.torch_features import matching_torchvision

    check_stack()
    install_mmcv_ops()
    extension = importlib.import_module('mmcv._ext')
    if not hasattr(extension, 'why_missing'):
        return Check("mmcv's operators", 'ok', 'compiled')
    if importlib.util.find_spec('torchvision') is None:
        return Check(
            "mmcv's operators",
            'FAIL',
            "mmcv has none compiled, and polynext_mm's need torchvision",
            f"pip install '{matching_torchvision()}'",
        )
    return Check(
        "mmcv's operators",
        'ok',
        "mmcv has none compiled: polynext_mm's stand in, on torchvision's kernels; only for "
        f'operators that they lack: {how_to_compile_mmcv()}',
    )


def check_compiling() -> Check:
    from polynext_mm.compat.torch_features import COMPILE_CELLS

    if not COMPILE_CELLS.is_there:
        return Check('torch.compile', 'note', COMPILE_CELLS.what_is_missing(), 'upgrade torch')
    if _compiler() is None:
        return Check(
            'torch.compile',
            'note',
            'no C++ compiler: compile_cells=True does not work on the CPU',
            'install one (Debian: apt install g++)',
        )
    return Check('torch.compile', 'ok', 'a C++ compiler is there')


def check_gpu_kernels() -> Check:
    import torch

    name, without = 'Triton kernels', "operations take torch's kernels"
    if not torch.cuda.is_available():
        hint = 'set CUDA_VISIBLE_DEVICES, or install a torch that fits the driver'
        return Check(name, 'note', f'no GPU: {without}', hint if _has_driver() else '')
    if importlib.util.find_spec('triton') is None:
        return Check(name, 'note', f'no triton: {without}', 'pip install triton')
    from polynext_mm.compat.torch_features import TRITON_KERNELS

    if not TRITON_KERNELS.is_there:
        return Check(name, 'note', f'{TRITON_KERNELS.what_is_missing()}: {without}')
    from polynext_mm.nn import kernel_check
    from polynext_mm.nn.ops import dispatch

    if dispatch.kernel_mode() == 'off':
        return Check(name, 'note', f'{dispatch.KERNELS_VARIABLE}=off: {without}')
    device = torch.device('cuda', torch.cuda.current_device())
    if not kernel_check.available(device):
        return Check(name, 'note', f'not for this GPU: {without}')
    result = kernel_check.check(device, (torch.float32, torch.bfloat16, torch.float16))
    if result.findings:
        found = '; '.join(map(str, result.findings))
        hint = "none: a training takes torch's operations instead"
        return Check(name, 'note', found, hint)
    return Check(name, 'ok', result.text)


def _has_driver() -> bool:
    return shutil.which('nvidia-smi') is not None


def check_optional() -> Check:
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    if not missing:
        return Check('optional packages', 'ok', ', '.join(_OPTIONAL))
    needed = '; '.join(f'{name}: {_OPTIONAL[name]}' for name in missing)
    return Check(
        'optional packages', 'note', f'absent, for {needed}', f'pip install {" ".join(missing)}'
    )


def check_weights() -> Check:
    from polynext_mm.weights import PUBLISHED
    from polynext_mm.weights.downloads import cached_path

    paths = {name: cached_path(file.url) for name, file in PUBLISHED.items()}
    there = [name for name, path in paths.items() if path.is_file()]
    cache = next(iter(paths.values())).parent
    text = f'{len(there)} of {len(paths)} published files are in {cache}'
    return Check('weights', 'ok', text + (f': {", ".join(there)}' if there else ''))


CHECKS: dict[str, Callable[[], Check]] = {
    'mm packages': check_installation,
    'torch': check_torch,
    'networks': check_networks,
    "mmcv's operators": check_operators,
    'segmentation': check_segmentation,
    'detection': check_detection,
    'torch.compile': check_compiling,
    'Triton kernels': check_gpu_kernels,
    'optional packages': check_optional,
    'weights': check_weights,
}


# A config and a checkpoint


def check_model(config: str, checkpoint: str | None) -> Iterator[Check]:
    """Build a config's model, look for its data, and check that the checkpoint fits."""
    built = []

    def check_config() -> Check:
        from mmengine.config import Config

        import polynext_mm.backbones  # noqa: F401 - registers
        from polynext_mm.analysis import build_model
        from polynext_mm.engine.checks import config as checks

        path = find_config(config)
        cfg = Config.fromfile(path)
        if 'model' not in cfg:
            return Check('config', 'FAIL', f'{path} has no model')
        checks.check_config(cfg)
        model = build_model(cfg, 'cpu')
        built.extend((cfg, model))
        millions = sum(param.numel() for param in model.parameters()) / 1e6
        figure = _figure_of_config(Path(path).stem)
        return Check('config', 'ok', f'{path}: {type(model).__name__}, {millions:.1f} M{figure}')

    yield _tried('config', check_config)
    if built:
        cfg, model = built
        yield _tried('data', lambda: check_data(cfg))
        if checkpoint is not None or Path(config).is_dir():
            yield _tried(
                'checkpoint', lambda: check_checkpoint(model, find_checkpoint(config, checkpoint))
            )


def check_data(cfg) -> Check:
    from polynext_mm.engine import launch

    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            try:
                launch.require_dataset(cfg[name].dataset)
            except launch.DatasetNotFoundError as error:
                first = str(error).partition('\n')[0]
                return Check('data', 'note', first, '--cfg-options data_root=FOLDER')
    return Check('data', 'ok', 'all folders and annotation files of the config exist')


def check_checkpoint(model: nn.Module, checkpoint: str) -> Check:
    """Check keys and shapes as loading does, and show the published figure of the file."""
    from polynext_mm.backbones.multiscale import MultiScale
    from polynext_mm.weights import CheckpointError, loading, read
    from polynext_mm.weights.names import BACKBONE

    content = read(checkpoint)
    said = _said_of(content, checkpoint)
    if not isinstance(getattr(model, 'backbone', None), MultiScale):
        weights, expected = content['state_dict'], model.state_dict()
        missing = [key for key in expected if key not in weights]
        loading.raise_unless_equal(
            expected, weights, missing, checkpoint, lambda: 'it is of another model'
        )
        return Check('checkpoint', 'ok', f'fits: all {len(expected)} tensors{said}')
    remedy = ''
    try:
        report = loading.check(model, dict(content['state_dict']), checkpoint, evaluation=True)
    except CheckpointError as error:
        report, remedy = str(error), 'it can start a training, and cannot be evaluated'
        loading.check(model, dict(content['state_dict']), checkpoint)
    backbone = model.backbone.adapt(dict(content['state_dict']), BACKBONE, checkpoint)
    return Check('checkpoint', 'note' if remedy else 'ok', f'{backbone}; {report}{said}', remedy)


def _said_of(content: dict, checkpoint: str) -> str:
    """Return what a checkpoint says about itself, and what was published about it."""
    from polynext_mm.weights import PUBLISHED

    meta = content.get('meta') or {}
    said = [f'{key} {meta[key]}' for key in ('epoch', 'iter', 'mmengine_version') if key in meta]
    classes = (meta.get('dataset_meta') or {}).get('classes')
    if classes:
        said.append(f'{len(classes)} classes')
    name = checkpoint.removeprefix('polynext://')
    published = PUBLISHED.get(name) or PUBLISHED.get(Path(name).stem)
    if published is not None:
        said.append(f'published: {published.figure} on {published.holds}')
    return f'; {", ".join(said)}' if said else ''


def _figure_of_config(name: str) -> str:
    """Return the published figure that configs/README.md gives for one of our configs."""
    from .list_all import configs

    header, *rows = configs()
    row = next((dict(zip(header, row)) for row in rows if row[0] == name), {})
    return f', published: {row["published"]}' if row.get('published') else ''
