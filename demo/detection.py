"""Train, evaluate and draw detectors on the sample of materials: ``make demo-detection``.

tools/train.py trains and tools/test.py evaluates, as for a user. mmdet's ResNet-18 and timm's
ConvNeXt-Atto, with the same neck, head and data, are trained for the same time; a short run of each
model tells how many iterations that is on this machine. OMP_NUM_THREADS sets the number of threads,
as for any program with torch.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from mmengine.config import Config

from run_tools import ROOT, announce, newest, run_tool

NAMES = {
    ROOT / 'configs' / 'atss_cpolynext_materials.py': 'CPolyNeXt, short',
    ROOT / 'configs' / 'atss_convnext_atto_materials.py': 'ConvNeXt-Atto',
    ROOT / 'configs' / 'atss_resnet18_materials.py': 'ResNet-18',
}
SECONDS = 150
PACE_ITERS = 24


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and evaluate on the sample of materials')
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
        help='training time of each of the three models (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the trainings (default: %(default)s)'
    )
    return parser.parse_args()


def train(config: Path, iterations: int, seed: int, work_dir: Path) -> list[float]:
    """Train for a number of iterations and return the seconds of each."""
    warm_up = min(Config.fromfile(config).param_scheduler[0].end, iterations // 2)
    run_tool(
        'train.py',
        config,
        '--work-dir',
        work_dir,
        '--cfg-options',
        f'randomness.seed={seed}',
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


def pace(config: Path, seed: int, work_dir: Path) -> float:
    """Return the seconds of an iteration: the median of a short run, which starts slowly."""
    return statistics.median(train(config, PACE_ITERS, seed, work_dir))


def evaluate(config: Path, iterations: int, work_dir: Path) -> dict[str, float]:
    """Return COCO's metrics on the test scenes, and draw truth and detections side by side."""
    checkpoint, pictures = work_dir / f'iter_{iterations}.pth', work_dir / 'pictures'
    run_tool('test.py', config, checkpoint, '--work-dir', work_dir, '--show-dir', pictures)
    return json.loads(newest(work_dir, '*/*.json').read_text())


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    folders = {config: args.work_dir / config.stem for config in NAMES}
    announce(f'Timing {PACE_ITERS} iterations of each of the {len(NAMES)} detectors (a minute)')
    iterations = {
        # one to warm up
        config: max(2, round(args.seconds / pace(config, args.seed, folder / 'pace')))
        for config, folder in folders.items()
    }
    rows = []
    for config, folder in folders.items():
        announce(
            f'Training ATSS with {NAMES[config]} for {iterations[config]} iterations '
            f'({args.seconds:.0f} seconds) and evaluating it (half a minute)'
        )
        seconds = sum(train(config, iterations[config], args.seed, folder))
        rows.append((config, seconds, evaluate(config, iterations[config], folder)))

    title = 'ATSS from scratch, with'
    print(f'\n{title:<26}{"iterations":>11}{"seconds":>9}{"AP":>8}{"AP50":>8}')
    for config, seconds, metrics in rows:
        print(
            f'{NAMES[config]:<26}{iterations[config]:>11}{seconds:>9.0f}'
            f'{metrics["coco/bbox_mAP"]:>8.3f}{metrics["coco/bbox_mAP_50"]:>8.3f}'
        )
    print(
        f'\n{time.monotonic() - start:.0f} s in all; pictures of the test scenes, truth on '
        'the left and detections on the right:'
    )
    for folder in folders.values():
        print(f'  {folder / "pictures"}')


if __name__ == '__main__':
    main()
