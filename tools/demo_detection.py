"""Train, evaluate and picture a detector on the sample of this repository: ``make demo-detection``.

The training is tools/train.py and the evaluation tools/test.py, as a user runs them. Beside CPolyNeXt-T
stands mmdet's ResNet-18 with the same neck, head and data, trained for the same time: its iterations are
counted out by a short run before.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / 'configs' / 'atss_cpolynext_t_treecrowns.py'
OTHER = ROOT / 'configs' / 'atss_resnet18_treecrowns.py'
PACE_ITERS = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train and evaluate on the tree crown sample')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs'),
                        help='where each config gets a folder of its own')
    parser.add_argument('--max-iters', type=int, help="instead of the config's, for a quick look")
    return parser.parse_args()


def run_tool(name: str, *args) -> None:
    subprocess.run([sys.executable, str(ROOT / 'tools' / name), *map(str, args)], check=True)


def train(config: Path, iterations: int, work_dir: Path) -> float:
    """Train for a number of iterations and return the seconds that they take, at the median pace."""
    warm_up = min(Config.fromfile(config).param_scheduler[0].end, iterations // 2)
    run_tool('train.py', config, '--work-dir', work_dir, '--cfg-options',
             f'train_cfg.max_iters={iterations}', f'train_cfg.val_interval={iterations}',
             f'param_scheduler.0.end={warm_up}', f'param_scheduler.1.begin={warm_up}',
             f'param_scheduler.1.end={iterations}', f'default_hooks.checkpoint.interval={iterations}',
             f'default_hooks.logger.interval={min(10, iterations)}')
    records = map(json.loads, newest(work_dir, '*/vis_data/scalars.json').read_text().splitlines())
    # the median: the first iterations, and whatever else the machine did meanwhile, are no pace
    pace = statistics.median(record['time'] for record in records if 'loss' in record)
    return pace * iterations


def evaluate(config: Path, iterations: int, work_dir: Path) -> dict[str, float]:
    """COCO's metrics on the validation tiles, and their pictures: truth left, detections right."""
    run_tool('test.py', config, work_dir / f'iter_{iterations}.pth', '--work-dir', work_dir,
             '--show-dir', work_dir / 'pictures')
    return json.loads(newest(work_dir, '*/*.json').read_text())


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def main() -> None:
    args = parse_args()
    iterations = args.max_iters or Config.fromfile(OURS).train_cfg.max_iters
    folder = args.work_dir / OURS.stem
    seconds = train(OURS, iterations, folder)
    rows = [('CPolyNeXt-T', iterations, seconds, evaluate(OURS, iterations, folder))]

    folder = args.work_dir / OTHER.stem
    pace = train(OTHER, PACE_ITERS, folder / 'pace') / PACE_ITERS
    iterations = max(1, round(seconds / pace))
    seconds = train(OTHER, iterations, folder)
    rows.append(('ResNet-18', iterations, seconds, evaluate(OTHER, iterations, folder)))

    print(f'\n{"tree crowns, from scratch":<26}{"iterations":>11}{"seconds":>9}{"AP":>8}{"AP50":>8}')
    for name, iterations, seconds, metrics in rows:
        print(f'{name:<26}{iterations:>11}{seconds:>9.0f}{metrics["coco/bbox_mAP"]:>8.3f}'
              f'{metrics["coco/bbox_mAP_50"]:>8.3f}')
    print('\npictures of the validation tiles, truth on the left and detections on the right:')
    for config in (OURS, OTHER):
        print(f'  {args.work_dir / config.stem / "pictures"}')


if __name__ == '__main__':
    main()
