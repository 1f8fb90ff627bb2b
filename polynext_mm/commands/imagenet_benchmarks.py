"""ImageNet-1K and the robustness benchmarks: their classes, and where their images are."""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path

SEVERITIES = range(1, 6)

#: AlexNet's mean top-1 error on each corruption of ImageNet-C, by which the benchmark's authors
#: divide (arXiv 1903.12261; github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    'gaussian_noise': 0.886428,
    'shot_noise': 0.894468,
    'impulse_noise': 0.922640,
    'defocus_blur': 0.819880,
    'glass_blur': 0.826268,
    'motion_blur': 0.785948,
    'zoom_blur': 0.798360,
    'snow': 0.866816,
    'frost': 0.826572,
    'fog': 0.819324,
    'brightness': 0.564592,
    'contrast': 0.853204,
    'elastic_transform': 0.646056,
    'pixelate': 0.717840,
    'jpeg_compression': 0.606500,
}


class LayoutError(FileNotFoundError):
    """A folder does not hold a benchmark in the layout that was expected."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A set of labelled images.

    Args:
        name: As papers call it.
        option: Its name on the command line.
        images: Number of images; for ImageNet-C, per corruption and severity.
        layout: Where the images are below the folder of the benchmark.
        subset: The list of classes in timm, 'a' or 'r'; '' for all classes.
    """

    name: str
    option: str
    images: int
    layout: str
    subset: str = ''

    @property
    def wnids(self) -> list[str]:
        """Return the WordNet ids of the classes."""
        return _timm_list(f'imagenet_{self.subset}_synsets' if self.subset else 'imagenet_synsets')

    @property
    def indices(self) -> list[int] | None:
        """Return the indices of the classes in ImageNet-1K; None for all 1000."""
        if not self.subset:
            return None
        return [int(line) for line in _timm_list(f'imagenet_{self.subset}_indices')]


BENCHMARKS = (
    Benchmark('ImageNet-1K', 'imagenet', 50000, 'n01440764/*.JPEG'),
    Benchmark('ImageNet-A', 'imagenet-a', 7500, 'n01498041/*.jpg', 'a'),
    Benchmark('ImageNet-R', 'imagenet-r', 30000, 'n01443537/*.jpg', 'r'),
    Benchmark('ImageNet-Sketch', 'imagenet-sketch', 50889, 'n01440764/*.JPEG'),
    Benchmark('ImageNet-C', 'imagenet-c', 50000, 'gaussian_noise/1/n01440764/*.JPEG'),
)


def _timm_list(name: str) -> list[str]:
    return pkgutil.get_data('timm.data', f'_info/{name}.txt').decode().split()


def find_images(benchmark: Benchmark, folder: Path, partial: bool = False) -> list[Path]:
    """Return the folder of a benchmark's classes; for ImageNet-C, one per condition.

    Args:
        benchmark: The benchmark expected there.
        folder: Its folder. For ImageNet-1K, it may be the parent of ``val``.
        partial: Accept missing classes.

    Returns:
        The folders to measure on; for ImageNet-C, 75: 15 corruptions at severities 1 to 5.

    Raises:
        LayoutError: If the folder has another layout; the message says what was expected.
    """
    folder = folder.expanduser()
    if benchmark.option == 'imagenet' and (folder / 'val').is_dir():
        folder /= 'val'
    folders = [folder]
    if benchmark.option == 'imagenet-c':
        folders = [folder / name / str(level) for name in ALEXNET_ERRORS for level in SEVERITIES]
    absent = [path for path in (folder, *folders) if not path.is_dir()]
    if absent:
        _complain(benchmark, folder, f'there is no folder {absent[0]}')
    wnids = benchmark.wnids
    for path in folders:
        present = {entry.name for entry in path.iterdir() if entry.is_dir()}
        missing = [wnid for wnid in wnids if wnid not in present]
        others = sorted(present - set(wnids))
        if len(missing) == len(wnids):
            _complain(benchmark, folder, f'none of its {len(wnids)} class folders is in {path}')
        if others:
            _complain(
                benchmark, folder, f'{path} has {len(others)} other folders, such as {others[0]}'
            )
        if missing and not partial:
            _complain(
                benchmark,
                folder,
                f'{len(missing)} of its {len(wnids)} class folders are not in {path}, such as '
                f'{missing[0]} (--partial measures the classes that are there)',
            )
    return folders


def _complain(benchmark: Benchmark, folder: Path, what: str) -> None:
    raise LayoutError(
        f'{folder} is not {benchmark.name}: {what}\n'
        f'  expected: {folder}/{benchmark.layout}, and so on for {len(benchmark.wnids)} classes'
        + (
            ' and 15 corruptions, each in severities 1 to 5'
            if benchmark.option == 'imagenet-c'
            else ''
        )
    )
