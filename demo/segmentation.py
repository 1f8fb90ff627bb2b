"""Train, evaluate and picture the main job on the sample of this repository: ``make demo``.

The training is tools/train.py and the evaluation tools/test.py, as a user runs them. Beside the network
stands a classifier that sees nothing but the colour of each pixel, fitted to the same tiles: what it
reaches is there without looking at the surroundings.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 - the backend comes first
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'upernet_cpolynext_t_landcover.py'
SAMPLE = ROOT / 'demo' / 'landcover'
IGNORED = 255
SHEET_ROWS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and evaluate on the land cover sample')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs') / CONFIG.stem)
    parser.add_argument('--max-iters', type=int, help="instead of the config's, for a quick look")
    return parser.parse_args()


def run_tool(name: str, *args) -> float:
    """Run a script of tools/ and return the seconds it took."""
    start = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / 'tools' / name), *map(str, args)], check=True)
    return time.monotonic() - start


def load_tiles(split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, images (N, H, W, 3) and labels (N, H, W) of a split: classes from 0, 255 to ignore."""
    files = sorted((SAMPLE / 'images' / split).glob('*.jpg'))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = np.stack(
        [
            np.asarray(Image.open(SAMPLE / 'annotations' / split / f'{file.stem}.png'))
            for file in files
        ]
    )
    return [file.stem for file in files], images, labels - 1  # uint8: 0 becomes 255


def class_ious(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """IoU of every class, in percent, as mmseg computes it."""
    areas = IoUMetric.intersect_and_union(
        torch.from_numpy(predictions), torch.from_numpy(labels), num_classes, IGNORED
    )
    return IoUMetric.total_area_to_metrics(*areas)['IoU'] * 100


def predict_by_colour(
    images: np.ndarray, labels: np.ndarray, others: np.ndarray, num_classes: int
) -> np.ndarray:
    """Fit a per-pixel classifier (three layers of 1x1) to ``images`` and apply it to ``others``."""
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
    steps = 1500
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
    path: Path, images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, metainfo: dict
) -> None:
    """Rows of input, truth and prediction, with a legend; spread over the validation tiles."""
    palette = np.full((256, 3), 0, np.uint8)
    palette[: len(metainfo['palette'])] = metainfo['palette']
    picked = np.linspace(0, len(images) - 1, 2 * SHEET_ROWS).astype(int)
    figure, axes = plt.subplots(SHEET_ROWS, 6, figsize=(9, 1.5 * SHEET_ROWS + 0.6))
    for place, tile in enumerate(picked):
        row, half = place % SHEET_ROWS, 3 * (place // SHEET_ROWS)
        truth = palette[labels[tile]]
        predicted = palette[predictions[tile]]
        for axis, picture in zip(axes[row, half : half + 3], (images[tile], truth, predicted)):
            axis.imshow(picture)
            axis.axis('off')
    for axis, title in zip(axes[0], ('input', 'truth', 'prediction') * 2):
        axis.set_title(title, fontsize=9)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=np.array(colour) / 255, ec='gray')
        for colour in metainfo['palette']
    ]
    figure.legend(handles, metainfo['classes'], ncol=len(handles), loc='lower center', fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1), pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(path: Path, scalars: Path) -> None:
    """Loss and validation mIoU over iterations, from the log of the training."""
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for axis, name, title in (
        (left, 'loss', 'training loss'),
        (right, 'mIoU', 'validation mIoU (%)'),
    ):
        points = [(record['step'], record[name]) for record in records if name in record]
        axis.plot(*zip(*points), marker='o' if name == 'mIoU' else None)
        axis.set(xlabel='iteration', title=title)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(CONFIG)
    iterations = args.max_iters or cfg.train_cfg.max_iters
    options = (
        []
        if args.max_iters is None
        else [
            '--cfg-options',
            f'train_cfg.max_iters={iterations}',
            f'train_cfg.val_interval={iterations}',
            f'default_hooks.checkpoint.interval={iterations}',
            'default_hooks.logger.interval=1',
        ]
    )
    seconds = run_tool('train.py', CONFIG, '--work-dir', args.work_dir, *options)
    scalars = max(args.work_dir.glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    folder = args.work_dir / 'predictions'
    run_tool(
        'test.py',
        CONFIG,
        args.work_dir / f'iter_{iterations}.pth',
        '--work-dir',
        args.work_dir,
        '--out',
        folder,
    )

    metainfo = cfg.metainfo
    num_classes = len(metainfo['classes'])
    _, train_images, train_labels = load_tiles('training')
    names, images, labels = load_tiles('validation')
    predictions = np.stack([np.asarray(Image.open(folder / f'{name}.png')) for name in names]) - 1
    ours = class_ious(predictions, labels, num_classes)
    by_colour = predict_by_colour(train_images, train_labels, images, num_classes)
    colour = class_ious(by_colour, labels, num_classes)
    draw_sheet(args.work_dir / 'sheet.png', images, labels, predictions, metainfo)
    draw_curves(args.work_dir / 'curves.png', scalars)

    print(
        f'\n{"IoU (%) on " + str(len(names)) + " tiles":<24}{"CPolyNeXt-T":>12}{"colour only":>14}'
    )
    for name, a, b in zip(metainfo['classes'], ours, colour):
        print(f'{name:<24}{a:>12.1f}{b:>14.1f}')
    print(f'{"mIoU":<24}{ours.mean():>12.1f}{colour.mean():>14.1f}')
    print(
        f'\ntrained for {iterations} iterations in {seconds:.0f} s, validation included\n'
        f'pictures: {args.work_dir / "sheet.png"}  {args.work_dir / "curves.png"}'
    )


if __name__ == '__main__':
    main()
