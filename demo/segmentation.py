"""Train, evaluate and draw a segmentor on the sample of materials: ``make demo``.

tools/train.py trains and tools/test.py evaluates, as for a user. For comparison, a classifier that
sees only the colour of each pixel is fitted to the same scenes: its IoU can be had without looking
at the surroundings. OMP_NUM_THREADS sets the number of threads, as for any program with torch.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 - the backend comes first
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from PIL import Image  # noqa: E402

from make_materials import SCENES, make_scenes  # noqa: E402
from polynext_mm.commands.arguments import positive  # noqa: E402
from polynext_mm.compat.logs import import_quietly  # noqa: E402
from run_tools import ROOT, announce, run_tool  # noqa: E402

import_quietly('mmseg.datasets')
IoUMetric = import_quietly('mmseg.evaluation').IoUMetric

CONFIG = ROOT / 'configs' / 'upernet_cpolynext_materials.py'
IGNORED = 255
SHEET_ROWS = 8
NETWORK = 'CPolyNeXt, short'
TRAINING_MINUTES = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and evaluate on the sample of materials')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs') / CONFIG.stem,
        help='folder for checkpoints, logs and pictures (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the training (default: %(default)s)'
    )
    parser.add_argument(
        '--max-iters', type=positive, help="instead of the config's, for a quick look"
    )
    return parser.parse_args()


def shortened(max_iters: int) -> list[str]:
    """Return options of the config for a training of so many iterations, evaluated at its end."""
    return [
        f'train_cfg.max_iters={max_iters}',
        f'train_cfg.val_interval={max_iters}',
        f'default_hooks.checkpoint.interval={max_iters}',
        'default_hooks.logger.interval=1',
    ]


def load_tiles(split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Load a split of the sample.

    Returns:
        Names; images, (N, H, W, 3) uint8; labels, (N, H, W) uint8.
    """
    files = sorted((SCENES / 'images' / split).glob('*.jpg'))
    names = [file.stem for file in files]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = load_labels(SCENES / 'annotations' / split, names)
    return names, images, labels


def load_labels(folder: Path, names: list[str]) -> np.ndarray:
    """Load label images as (N, H, W) uint8."""
    return np.stack([np.asarray(Image.open(folder / f'{name}.png')) for name in names])


def class_ious(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the IoU of every class in percent, as mmseg computes it."""
    areas = IoUMetric.intersect_and_union(
        torch.from_numpy(predictions), torch.from_numpy(labels), num_classes, IGNORED
    )
    return IoUMetric.total_area_to_metrics(*areas)['IoU'] * 100


def predict_by_colour(
    images: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    num_classes: int,
    steps: int = 1500,
) -> np.ndarray:
    """Fit a classifier of single pixels to ``images`` and return its labels for ``others``."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, num_classes),
    )
    x = torch.from_numpy(images.reshape(-1, 3)).float() / 128 - 1
    y = torch.from_numpy(labels.reshape(-1)).long()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (8192,))
        loss = torch.nn.functional.cross_entropy(net(x[pick]), y[pick], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        z = net(torch.from_numpy(others.reshape(-1, 3)).float() / 128 - 1)
    return z.argmax(1).numpy().astype(np.uint8).reshape(others.shape[:3])


def draw_sheet(
    path: Path,
    title: str,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    metainfo: dict,
) -> None:
    """Draw input, truth and prediction of scenes from all over the split, with a legend."""
    palette = np.array(metainfo['palette'], np.uint8)
    picked = np.linspace(0, len(images) - 1, 2 * SHEET_ROWS).astype(int)
    figure, axes = plt.subplots(SHEET_ROWS, 6, figsize=(9, 1.5 * SHEET_ROWS + 0.6))
    for place, tile in enumerate(picked):
        row, half = place % SHEET_ROWS, 3 * (place // SHEET_ROWS)
        pictures = images[tile], palette[labels[tile]], palette[predictions[tile]]
        for axis, picture in zip(axes[row, half : half + 3], pictures):
            axis.imshow(picture)
            axis.axis('off')
    for axis, column in zip(axes[0], ('input', 'truth', 'prediction') * 2):
        axis.set_title(column, fontsize=9)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=np.array(colour) / 255, ec='gray')
        for colour in metainfo['palette']
    ]
    figure.legend(handles, metainfo['classes'], ncol=len(handles), loc='lower center', fontsize=9)
    figure.suptitle(title, fontsize=10, y=0.995)
    figure.tight_layout(rect=(0, 0.03, 1, 0.98), pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    make_scenes()
    work_dir = args.work_dir
    cfg = Config.fromfile(CONFIG)
    iterations = args.max_iters or cfg.train_cfg.max_iters
    options = ['--cfg-options', f'randomness.seed={args.seed}']
    if args.max_iters is not None:
        options += shortened(args.max_iters)
    minutes = TRAINING_MINUTES * iterations / cfg.train_cfg.max_iters
    announce(
        f'Training for {iterations} iterations with seed {args.seed} on {torch.get_num_threads()} '
        f'threads (about {max(1, round(minutes))} minutes on two cores)'
    )
    start = time.monotonic()
    run_tool('train.py', CONFIG, '--work-dir', work_dir, *options)
    seconds = time.monotonic() - start
    checkpoint, kept = work_dir / f'iter_{iterations}.pth', work_dir / 'predictions'
    announce('Evaluating on the test scenes, which nothing was chosen on (half a minute)')
    run_tool('test.py', CONFIG, checkpoint, '--work-dir', work_dir, '--out', kept)

    announce('Fitting a classifier that sees only colours, and drawing (half a minute)')
    metainfo = cfg.metainfo
    num_classes = len(metainfo['classes'])
    _, train_images, train_labels = load_tiles('training')
    names, images, labels = load_tiles('test')
    predictions = load_labels(kept, names)
    by_colour = predict_by_colour(train_images, train_labels, images, num_classes)
    ours, colour = (class_ious(p, labels, num_classes) for p in (predictions, by_colour))
    title = (
        f'{NETWORK}, {iterations} iterations from scratch: {ours.mean():.1f} mIoU; a classifier '
        f'of single pixels by colour: {colour.mean():.1f}'
    )
    draw_sheet(work_dir / 'sheet.png', title, images, labels, predictions, metainfo)

    print(f'\n{f"IoU (%) on {len(names)} scenes":<24}{NETWORK:>18}{"colour only":>14}')
    for name, a, b in zip(metainfo['classes'], ours, colour):
        print(f'{name:<24}{a:>18.1f}{b:>14.1f}')
    print(f'{"mIoU":<24}{ours.mean():>18.1f}{colour.mean():>14.1f}')
    print(f'\ntrained for {iterations} iterations in {seconds:.0f} s, validation included')
    print(f'pictures: {work_dir / "sheet.png"}  {work_dir / "report"}')


if __name__ == '__main__':
    main()
