"""Train, evaluate and draw a detector on the tree crown sample: ``make demo-detection``.

tools/train.py trains and tools/test.py evaluates, as for a user. mmdet's ResNet-18, with the same
neck, head and data, is trained for the same time; a short run of each model tells how many
iterations that is on this machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from mmengine.config import Config

from run_tools import ROOT, newest, run_tool

NAMES = {
    ROOT / 'configs' / 'atss_cpolynext_t_treecrowns.py': 'CPolyNeXt-T',
    ROOT / 'configs' / 'atss_resnet18_treecrowns.py': 'ResNet-18',
}
SECONDS = 200
PACE_ITERS = 24


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and evaluate on the tree crown sample')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs'),
        help='folder with a subfolder for each config (default: %(default)s)',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=SECONDS,
        help='training time of each of the two models (default: %(default)s)',
    )
    return parser.parse_args()


def train(config: Path, iterations: int, work_dir: Path) -> list[float]:
    """Train for a number of iterations and return the seconds of each."""
    warm_up = min(Config.fromfile(config).param_scheduler[0].end, iterations // 2)
    run_tool(
        'train.py',
        config,
        '--work-dir',
        work_dir,
        '--cfg-options',
        f'train_cfg.max_iters={iterations}',
        f'train_cfg.val_interval={iterations}',
        f'param_scheduler.0.end={warm_up}',
        f'param_scheduler.1.begin={warm_up}',
        f'param_scheduler.1.end={iterations}',
        f'default_hooks.checkpoint.interval={iterations}',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',
    )
    records = map(json.loads, newest(work_dir, '*/vis_data/scalars.json').read_text().splitlines())
    return [record['time'] for record in records if 'loss' in record]


def pace(config: Path, work_dir: Path) -> float:
    """Return the seconds of an iteration: the median of a short run, which starts slowly."""
    return statistics.median(train(config, PACE_ITERS, work_dir))


def evaluate(config: Path, iterations: int, work_dir: Path) -> dict[str, float]:
    """Return COCO's metrics on the validation tiles, and draw truth and detections side by side."""
    checkpoint, pictures = work_dir / f'iter_{iterations}.pth', work_dir / 'pictures'
    run_tool('test.py', config, checkpoint, '--work-dir', work_dir, '--show-dir', pictures)
    return json.loads(newest(work_dir, '*/*.json').read_text())


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    folders = {config: args.work_dir / config.stem for config in NAMES}
    iterations = {
        config: max(2, round(args.seconds / pace(config, folder / 'pace')))  # one to warm up
        for config, folder in folders.items()
    }
    rows = []
    for config, folder in folders.items():
        seconds = sum(train(config, iterations[config], folder))
        rows.append((config, seconds, evaluate(config, iterations[config], folder)))

    title = 'tree crowns, from scratch'
    print(f'\n{title:<26}{"iterations":>11}{"seconds":>9}{"AP":>8}{"AP50":>8}')
    for config, seconds, metrics in rows:
        print(
            f'{NAMES[config]:<26}{iterations[config]:>11}{seconds:>9.0f}'
            f'{metrics["coco/bbox_mAP"]:>8.3f}{metrics["coco/bbox_mAP_50"]:>8.3f}'
        )
    print(
        f'\n{time.monotonic() - start:.0f} s in all; pictures of the validation tiles, truth on '
        'the left and detections on the right:'
    )
    for folder in folders.values():
        print(f'  {folder / "pictures"}')


if __name__ == '__main__':
    main()
