"""Train, evaluate and draw detectors on the sample of materials: ``make demo-detection``.

tools/train.py trains and tools/test.py evaluates, as for a user. A CPolyNeXt starts from the
backbone of the segmentor that ``make demo`` trains on the same scenes, which is trained first where
it is missing. The same network, timm's ConvNeXt-Atto and mmdet's ResNet-18 start from nothing.
Neck, head, data and time are the same; a short run of each model tells how many iterations that is
on this machine. OMP_NUM_THREADS sets the number of threads, as for any program with torch.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from make_materials import make_scenes
from run_tools import ROOT, announce, newest, run_tool
from segmentation import CONFIG as SEGMENTOR
from segmentation import TRAINING_MINUTES

PRETRAINED = ROOT / 'configs' / 'atss_cpolynext_materials_pretrained.py'
NAMES = {
    PRETRAINED: 'CPolyNeXt, short, pretrained',
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
        help='training time of each of the four detectors (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the trainings (default: %(default)s)'
    )
    parser.add_argument(
        '--backbone',
        type=Path,
        metavar='CHECKPOINT',
        help=f'what the pretrained backbone starts from, of {SEGMENTOR.name} '
        '(default: that of `make demo` in the work dir, trained first if it is missing)',
    )
    args = parser.parse_args()
    if args.backbone is not None and not args.backbone.is_file():
        parser.error(f'--backbone: there is no checkpoint {args.backbone}')
    return args


def segmentor(work_dir: Path, seed: int) -> Path:
    """Return the checkpoint that ``make demo`` leaves, after training it if it is missing."""
    folder = work_dir / SEGMENTOR.stem
    checkpoint = folder / f'iter_{Config.fromfile(SEGMENTOR).train_cfg.max_iters}.pth'
    if not checkpoint.is_file():
        announce(
            f'There is no {checkpoint}: training the segmentor of `make demo` first (about '
            f'{TRAINING_MINUTES} minutes on two cores)'
        )
        seed_option = f'randomness.seed={seed}'
        run_tool('train.py', SEGMENTOR, '--work-dir', folder, '--cfg-options', seed_option)
    return checkpoint


def train(
    config: Path, iterations: int, seed: int, work_dir: Path, options: Sequence[str]
) -> list[float]:
    """Train for a number of iterations, with more options, and return the seconds of each."""
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
        *options,
    )
    records = map(json.loads, newest(work_dir, '*/vis_data/scalars.json').read_text().splitlines())
    return [record['time'] for record in records if 'loss' in record]


def pace(config: Path, seed: int, work_dir: Path, options: Sequence[str]) -> float:
    """Return the seconds of an iteration: the median of a short run, which starts slowly."""
    return statistics.median(train(config, PACE_ITERS, seed, work_dir, options))


def evaluate(config: Path, iterations: int, work_dir: Path) -> dict[str, float]:
    """Return COCO's metrics on the test scenes, and draw truth and detections side by side."""
    checkpoint, pictures = work_dir / f'iter_{iterations}.pth', work_dir / 'pictures'
    run_tool('test.py', config, checkpoint, '--work-dir', work_dir, '--show-dir', pictures)
    return json.loads(newest(work_dir, '*/*.json').read_text())


def main() -> None:
    args = parse_args()
    make_scenes()
    start = time.monotonic()
    folders = {config: args.work_dir / config.stem for config in NAMES}
    backbone = args.backbone or segmentor(args.work_dir, args.seed)
    options = {config: [] for config in NAMES}
    options[PRETRAINED] = [f'model.backbone.init_cfg.checkpoint={backbone}']
    announce(f'Timing {PACE_ITERS} iterations of each of the {len(NAMES)} detectors (a minute)')
    iterations = {}
    for config, folder in folders.items():
        seconds = pace(config, args.seed, folder / 'pace', options[config])
        iterations[config] = max(2, round(args.seconds / seconds))  # one to warm up
    rows = []
    for config, folder in folders.items():
        announce(
            f'Training ATSS with {NAMES[config]} for {iterations[config]} iterations '
            f'({args.seconds:.0f} seconds) and evaluating it (half a minute)'
        )
        seconds = sum(train(config, iterations[config], args.seed, folder, options[config]))
        rows.append((config, seconds, evaluate(config, iterations[config], folder)))

    print(f'\n{"ATSS with":<30}{"iterations":>11}{"seconds":>9}{"AP":>8}{"AP50":>8}')
    for config, seconds, metrics in rows:
        print(
            f'{NAMES[config]:<30}{iterations[config]:>11}{seconds:>9.0f}'
            f'{metrics["coco/bbox_mAP"]:>8.3f}{metrics["coco/bbox_mAP_50"]:>8.3f}'
        )
    print(
        f'\npretrained: the backbone starts from {backbone}.\n'
        'That of `make demo` has seen the segmentation labels of the training scenes for about '
        f'{TRAINING_MINUTES} minutes\nmore, which are not among these seconds. '
        'The three others start from nothing.'
    )
    print(
        f'\n{time.monotonic() - start:.0f} s in all; pictures of the test scenes, truth on '
        'the left and detections on the right:'
    )
    for folder in folders.values():
        print(f'  {folder / "pictures"}')


if __name__ == '__main__':
    main()
