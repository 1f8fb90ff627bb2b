"""How time and peak memory are measured.

Time: all subjects live in one process and take turns, one step each per round, so that other load
on the machine affects all of them alike. Even rounds go forward and odd ones backward through the
list, so that no subject always runs after the same one.

Peak memory on a CPU is measured in a process of its own, for which this file is run as a script. It
is the maximum resident memory during a step, less the resident memory just before it, plus the
weights. An earlier step has run by then: code, thread stacks and compiled kernels are loaded, and
its gradients are freed. So weights, gradients, activations and scratch space count; the input, the
optimizer state and the interpreter do not. On Linux with glibc two things make this exact:

- freed memory returns to the system at once (ENVIRONMENT, heap_trim), so that the measured step
  cannot reuse what the first one left behind;
- the kernel's high-water mark, VmHWM, is reset just before the step, so that no earlier peak
  counts. (Linux lets a process inherit its parent's ru_maxrss, and does not reset it.)

Where the mark cannot be reset, the very first step is measured, by ru_maxrss. That includes what
the libraries load and compile in it, and is an upper bound.

On a GPU it is max_memory_allocated of its torch module (torch.cuda, torch.xpu) for a step, which
includes weights and input. Where there is no such count (MPS), there is no figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from polynext_mm.compat.torch_features import device_module
from subjects import Setting, Subject, Workload, make_workload

# For the process whose memory is measured: glibc maps blocks of 64 KiB and more one by one, and
# unmaps them when they are freed.
ENVIRONMENT = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}


@dataclasses.dataclass
class Result:
    """The measurements of a subject.

    Args:
        subject: In the memory format that was fastest.
        setting: The conditions.
        times: Seconds, one per round; empty if the subject did not fit into memory.
        peak: Bytes.
        method: How the peak was measured, or why it could not be.
    """

    subject: Subject
    setting: Setting
    times: list[float]
    peak: int | None = None
    method: str | None = None

    @property
    def name(self) -> str:
        return f'{self.subject.label}, {self.setting.mode}, {self.setting.shown_size}'

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.times else None

    @property
    def quartiles(self) -> list[float]:
        """The first and the third, in seconds."""
        return np.percentile(self.times, [25, 75]).tolist()

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        first, third = self.quartiles
        return (third - first) / self.median

    def time_ratio(self, baseline: Result) -> float | None:
        """Return the median of the ratios within a round, in which a drift of speed cancels."""
        if not self.times or not baseline.times:
            return None
        return statistics.median(a / b for a, b in zip(self.times, baseline.times))

    def memory_ratio(self, baseline: Result) -> float | None:
        return None if None in (self.peak, baseline.peak) else self.peak / baseline.peak


def measure(
    subjects: list[Subject], setting: Setting, rounds: int, warmup: int, memory: bool = False
) -> list[Result]:
    """Measure subjects side by side and return one result for each, in order."""
    variants = [variant for subject in subjects for variant in subject.variants()]
    times = _measure_times(variants, setting, rounds, warmup)
    if setting.device != 'cpu':  # for the processes that measure memory
        device_module(setting.device).empty_cache()
    results = []
    for subject in subjects:
        fitting = [variant for variant in subject.variants() if variant in times]
        best = min(fitting, key=lambda v: statistics.median(times[v]), default=subject)
        results.append(Result(best, setting, times.get(best, [])))
    for result in results:
        if memory and result.times:
            say(f'memory of {result.name}')
            result.peak, result.method = peak_memory(result.subject, setting)
    return results


def _measure_times(
    subjects: list[Subject], setting: Setting, rounds: int, warmup: int
) -> dict[Subject, list[float]]:
    """Return the seconds of every round, for each subject that fits into memory."""
    torch.compiler.reset()  # drops what was compiled for other settings
    steps = {}
    for subject in subjects:
        say(f'{subject.label} ({subject.memory_format}), {setting.mode}, {setting.shown_size}')
        step = unless_out_of_memory(_warmed_up, subject, setting, warmup)
        if step is not None:
            steps[subject] = step
    times = {subject: [] for subject in steps}
    for i in range(rounds):
        for subject in reversed(steps) if i % 2 else steps:
            times[subject].append(seconds(steps[subject], setting.device))
    for subject, found in times.items():  # the tables come once everything is measured
        say(f'{subject.label} ({subject.memory_format}): {1e3 * statistics.median(found):.4g} ms')
    return times


def _warmed_up(subject: Subject, setting: Setting, steps: int) -> Callable[[], None]:
    work = make_workload(subject, setting)
    for _ in range(steps):
        work.step()
    return work.step


def seconds(step: Callable[[], None], device: str) -> float:
    """Time one step, including what it leaves a GPU to do."""
    synchronize = device_module(device).synchronize  # of the CPU, it does nothing
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def say(line: str) -> None:
    """Print progress to stderr, apart from the report."""
    print(line, file=sys.stderr, flush=True)


# Memory


def unless_out_of_memory(function: Callable, *args):
    """Call a function and return what it returns, or None if it ran out of memory."""
    try:
        return function(*args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return None
        raise


def limit_memory(device: str) -> None:
    """Make allocations beyond the available memory fail, before the kernel kills some process."""
    if device == 'cpu':
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.virtual_memory().available, hard))


def peak_memory(subject: Subject, setting: Setting) -> tuple[int | None, str]:
    """Measure the peak memory of a step, in a process of its own.

    Returns:
        Bytes, or None if it did not fit; and the method, or the reason.

    Raises:
        RuntimeError: If the process failed, with its output.
    """
    request = json.dumps([dataclasses.asdict(subject), dataclasses.asdict(setting)])
    done = subprocess.run(
        [sys.executable, __file__, request],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    if done.returncode == -signal.SIGKILL:
        return None, 'killed by the kernel'
    if done.returncode:
        raise RuntimeError(f'measuring the memory of {subject.label} failed:\n{done.stderr}')
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _measure_own_peak(request: str) -> tuple[int | None, str]:
    """Do what :func:`peak_memory` asks of its process."""
    subject, setting = json.loads(request)
    subject, setting = Subject(**subject), Setting(**setting)
    torch.set_num_threads(setting.threads)
    limit_memory(setting.device)
    return unless_out_of_memory(_peak, subject, setting) or (None, 'did not fit')


def _peak(subject: Subject, setting: Setting) -> tuple[int, str]:
    work = make_workload(subject, setting)
    return cpu_peak(work) if setting.device == 'cpu' else _gpu_peak(work, setting.device)


def _gpu_peak(work: Workload, device: str) -> tuple[int | None, str]:
    module = device_module(device)
    if not hasattr(module, 'max_memory_allocated'):
        return None, f'torch.{device} does not count it'
    work.step()
    module.reset_peak_memory_stats()
    work.step()
    return module.max_memory_allocated(), f'torch.{device}.max_memory_allocated'


def cpu_peak(work: Workload) -> tuple[int, str]:
    """Measure a step in this process, whose environment must have ENVIRONMENT.

    Returns:
        Bytes, and the method.
    """
    if not _reset_high_water():
        before = _maxrss()
        work.step()
        return _maxrss() - before + work.held, 'ru_maxrss'
    work.step()
    gc.collect()
    with contextlib.suppress(AttributeError):  # psutil has it for glibc, not for musl
        psutil.heap_trim()
    _reset_high_water()
    before = psutil.Process().memory_info().rss
    work.step()
    return _high_water() - before + work.held, 'VmHWM'


def _reset_high_water() -> bool:
    """Set VmHWM to what is resident now; return False where the system cannot."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def _high_water() -> int:
    """Return VmHWM in bytes; psutil does not have it."""
    kibibytes = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]
    return int(kibibytes) << 10


def _maxrss() -> int:
    """Return bytes: Linux counts in KiB, macOS in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == 'darwin' else most << 10


if __name__ == '__main__':
    print(json.dumps(_measure_own_peak(sys.argv[1])))
