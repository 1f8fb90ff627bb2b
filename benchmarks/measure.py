"""What benchmarks/run.py compares, and how it measures time and peak memory.

Time. All subjects live in one process and take turns, one step each a round, so that whatever else
the machine does meets all of them alike.

Peak memory on a CPU is measured in a process of its own, for which this file is run: the most that
is resident during one step, less what is resident right before it, plus the weights. Right before
means after another such step: code, thread stacks and compiled kernels are there already, and the
gradients of that step are gone. So weights, gradients, activations and scratch space count; the
input, an optimizer's state and the interpreter do not. Two things make it exact (Linux, glibc):

- freed memory goes back to the system at once (ENVIRONMENT, malloc_trim), so that no remains of the
  first step serve the second;
- the kernel's high-water mark, VmHWM, is set back right before the step, so that no earlier peak
  counts.

Where the mark cannot be set back, the very first step is measured, by ru_maxrss. That includes what
the libraries load and compile in it: an upper estimate.

On CUDA it is torch.cuda.max_memory_allocated of a step, which includes weights and input.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import gc
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from polynext_mm.nn import ARCHS, PolyNeXt, poly_attention
from polynext_mm.nn.ops.poly_attention import plain as plain_attention
from polynext_mm.nn.plain import PlainPolyNeXt
from polynext_mm.weights.names import translate_back

# The modifiers each family of models takes.
MODIFIERS = {'ours': ('fuse', 'compile', 'cp'), 'plain': ('compile',), 'timm': ('compile',)}
# The memory format of each family's images; timm's models run in either.
FAMILY_FORMATS = {'ours': 'channels_last', 'plain': 'contiguous', 'timm': None}
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {name: getattr(torch, name) for name in ('float32', 'bfloat16', 'float16')}

# Attention alone: heads as in the third stage of the S archs.
ATTENTION = {'blocks': poly_attention, 'matrix': plain_attention}
HEADS, HEAD_WIDTH = 5, 32

# Of the process whose memory is measured: glibc maps blocks from 64 KiB on one by one, and unmaps
# them when they are freed.
ENVIRONMENT = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Under what a subject is measured.

    Args:
        mode (str): 'inference', or 'train': forward and backward, no optimizer.
        size (tuple[int]): (H, W) of the image, or (tokens,) for attention.
        batch (int): Images.
        dtype (str): 'float32'; others by autocast (attention alone: of its inputs).
        device (str): 'cpu', 'cuda'; 'meta' computes nothing.
        threads (int): Of the CPU.
    """

    mode: str
    size: tuple[int, ...]
    batch: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    threads: int = 1

    @property
    def shown_size(self) -> str:
        return 'x'.join(map(str, self.size))


@dataclasses.dataclass(frozen=True)
class Subject:
    """Something to measure.

    Args:
        label (str): What the user calls it.
        family (str): 'ours', 'plain', 'timm' or 'attention'.
        name (str): Of the family's.
        memory_format (str | None): A key of MEMORY_FORMATS, or None if the fastest is to be found.
        modifiers (tuple[str]): Of the family's MODIFIERS.
    """

    label: str
    family: str
    name: str
    memory_format: str | None = None
    modifiers: tuple[str, ...] = ()

    def variants(self) -> list['Subject']:
        """Itself, or itself in every memory format if the fastest is to be found."""
        if self.memory_format is not None:
            return [self]
        return [dataclasses.replace(self, memory_format=name) for name in MEMORY_FORMATS]


@dataclasses.dataclass
class Workload:
    """One measurable step, and the bytes it needs to hold that are there before it starts."""

    step: Callable[[], None]
    held: int


def parse_subject(label: str) -> Subject:
    """The model called ``NAME``, ``plain:NAME`` or ``timm:NAME[:MEMORY_FORMAT]``, then
    ``+MODIFIER`` any number of times.

    Raises:
        ValueError: For what does not exist, with what does.
    """
    model, *modifiers = label.split('+')
    family, name, *rest = model.split(':') if ':' in model else ('ours', model)
    if family not in MODIFIERS:
        raise ValueError(
            f'{label}: unknown kind of model {family!r}: write ARCH, plain:ARCH or '
            f'timm:NAME, with ARCH one of {", ".join(ARCHS)}'
        )
    if family == 'timm':
        _check_timm(label, name)
    elif name not in ARCHS:
        raise ValueError(f'{label}: unknown arch {name!r}: choose one of {", ".join(ARCHS)}')
    if rest and (family != 'timm' or len(rest) > 1 or rest[0] not in MEMORY_FORMATS):
        raise ValueError(
            f'{label}: after the name a timm model, and no other, takes one of '
            f'{", ".join(f":{name}" for name in MEMORY_FORMATS)}'
        )
    for modifier in modifiers:
        if modifier not in MODIFIERS[family]:
            raise ValueError(
                f'{label}: unknown modifier +{modifier}: {family} models take '
                f'{", ".join(f"+{name}" for name in MODIFIERS[family])}'
            )
    memory_format = rest[0] if rest else FAMILY_FORMATS[family]
    return Subject(label, family, name, memory_format, tuple(modifiers))


def _check_timm(label: str, name: str) -> None:
    try:
        import timm
    except ImportError:
        raise ValueError(f'{label} needs timm: pip install timm') from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(
            f'{label}: timm has no model {name!r}'
            + (f': did you mean {", ".join(close)}?' if close else '')
        )


def build_model(subject: Subject) -> nn.Module:
    """A model that returns a list of features, with weights as for training from scratch."""
    if subject.family == 'timm':
        import timm

        model = timm.create_model(subject.name, features_only=True)
        model = model.to(memory_format=MEMORY_FORMATS[subject.memory_format])
    else:
        model = PolyNeXt(subject.name, with_cp='cp' in subject.modifiers)
    if subject.family == 'plain':
        weights = translate_back(model.state_dict(), model.arch)
        model = PlainPolyNeXt(subject.name)
        model.load_state_dict(weights)
    if 'fuse' in subject.modifiers:
        model.fuse()
    if 'compile' in subject.modifiers:
        _compile(model)
    return model


def _compile(model: nn.Module) -> None:
    """Compile our cells for any size, or the whole of another model for each size by itself."""
    from torch._dynamo import config

    # what exceeds the limit would not be compiled, and nobody would notice
    config.fail_on_recompile_limit_hit = True
    if isinstance(model, PolyNeXt):
        model.compile_cells()
    else:
        model.compile(dynamic=False)


def make_workload(subject: Subject, setting: Setting) -> Workload:
    """Build the subject and its input, and nothing else yet.

    Raises:
        RuntimeError: If the machine has not the memory (see :func:`is_out_of_memory`).
    """
    torch.manual_seed(0)
    if subject.family == 'attention':
        return _attention_workload(subject, setting)
    train = setting.mode == 'train'
    model = build_model(subject).to(setting.device).train(train)
    image = torch.randn(setting.batch, 3, *setting.size, device=setting.device)
    image = image.contiguous(memory_format=MEMORY_FORMATS[subject.memory_format])

    def step():
        with torch.set_grad_enabled(train), _precision(setting):
            features = model(image)
        if train:
            sum(feature.float().mean() for feature in features).backward()
            model.zero_grad(set_to_none=True)

    return Workload(step, _bytes([*model.parameters(), *model.buffers()]))


def _attention_workload(subject: Subject, setting: Setting) -> Workload:
    """Forward and backward of one attention; q, k and v are what it holds."""
    attend = ATTENTION[subject.name]
    inputs = [
        torch.randn(setting.batch, HEADS, *setting.size, HEAD_WIDTH, device=setting.device)
        .to(DTYPES[setting.dtype])
        .requires_grad_()
        for _ in 'qkv'
    ]

    def step():
        q, k, v = inputs
        attend(q * HEAD_WIDTH**-0.5, k, v).float().mean().backward()
        for tensor in inputs:
            tensor.grad = None

    return Workload(step, _bytes(inputs))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _precision(setting: Setting):
    if setting.dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(setting.device, DTYPES[setting.dtype])


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that the CPU or the GPU has not that much memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def limit_memory(device: str) -> None:
    """Let what does not fit fail here, instead of the kernel ending whichever process it likes."""
    available = proc_value('/proc/meminfo', 'MemAvailable')
    if device == 'cpu' and available is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (available, hard))


def warmed_up(subject: Subject, setting: Setting, steps: int) -> Workload | None:
    """The subject's workload after some steps, or None if it did not fit into memory."""
    try:
        work = make_workload(subject, setting)
        for _ in range(steps):
            work.step()
        return work
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise


def seconds(step: Callable[[], None], device: str) -> float:
    """How long one step takes, a GPU's work included."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def take_turns(works: dict, rounds: int, device: str) -> dict:
    """Seconds of every workload in every round; every other round goes in reverse order, so that
    nobody always follows the same neighbour."""
    times = {key: [] for key in works}
    for i in range(rounds):
        for key in reversed(works) if i % 2 else works:
            times[key].append(seconds(works[key].step, device))
    return times


def _synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(subject: Subject, setting: Setting) -> tuple[int | None, str]:
    """Peak bytes of a step, as this file's head says, and by which method; None if it did not fit.

    Raises:
        RuntimeError: If the process failed, with what it said.
    """
    request = json.dumps([dataclasses.asdict(subject), dataclasses.asdict(setting)])
    done = subprocess.run(
        [sys.executable, __file__, request],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    if done.returncode == -signal.SIGKILL:
        return None, 'ended by the kernel'
    if done.returncode:
        raise RuntimeError(f'measuring the memory of {subject.label} failed:\n{done.stderr}')
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _measure_own_peak(request: str) -> tuple[int | None, str]:
    """What :func:`peak_memory` asks of its process."""
    subject, setting = json.loads(request)
    subject, setting = Subject(**subject), Setting(**setting)
    torch.set_num_threads(setting.threads)
    limit_memory(setting.device)
    try:
        work = make_workload(subject, setting)
        return _cuda_peak(work) if setting.device == 'cuda' else _cpu_peak(work)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None, 'did not fit'
        raise


def _cuda_peak(work: Workload) -> tuple[int, str]:
    work.step()
    torch.cuda.reset_peak_memory_stats()
    work.step()
    return torch.cuda.max_memory_allocated(), 'torch.cuda.max_memory_allocated'


def _cpu_peak(work: Workload) -> tuple[int, str]:
    if not _reset_high_water():
        before = _maxrss()
        work.step()
        return _maxrss() - before + work.held, 'ru_maxrss'
    work.step()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    _reset_high_water()
    before = proc_value('/proc/self/status', 'VmRSS')
    work.step()
    return proc_value('/proc/self/status', 'VmHWM') - before + work.held, 'VmHWM'


def _reset_high_water() -> bool:
    """Set VmHWM back to what is resident now; False where the system cannot."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def _maxrss() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else most << 10


def proc_value(path: str, field: str) -> int | None:
    """Bytes of a 'Field:  123 kB' of a file in /proc, or None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f'{field}:'):
                return int(line.split()[1]) << 10
    return None


def cpu_name() -> str:
    """The processor as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


if __name__ == '__main__':
    print(json.dumps(_measure_own_peak(sys.argv[1])))
