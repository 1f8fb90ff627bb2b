"""polynext-mm plot: logs by iteration and by epoch, resumed ones, and the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polynext_mm.commands.plot import main
from polynext_mm.figures import curve, default_keys
from polynext_mm.scalars import Point, read_run
from tests.helpers.programs import python_without


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def step(iteration: int, loss: float, **more) -> dict:
    return dict(lr=1e-3 / iteration, loss=loss, time=0.1, iter=iteration, step=iteration, **more)


@pytest.fixture
def by_iteration(tmp_path):
    """An UperNet's, validated every 100 iterations, killed after 250 and resumed from 200."""
    work_dir = tmp_path / 'upernet'
    start = [step(50, 3.0), step(100, 2.0), dict(mIoU=20.0, aAcc=60.0, time=0.2, step=100)]
    lost = [step(150, 1.9), step(200, 1.8), dict(mIoU=30.0, aAcc=70.0, step=200), step(250, 9.0)]
    write(work_dir / '20260101_000000' / 'vis_data' / 'scalars.json', start + lost)
    again = [step(250, 1.7), step(300, 1.6), dict(mIoU=40.0, aAcc=80.0, step=300)]
    write(work_dir / '20260102_000000' / 'vis_data' / 'scalars.json', again)
    return work_dir


@pytest.fixture
def by_epoch(tmp_path):
    """A detector's, 60 iterations an epoch, logged every 50."""
    records = [
        *(step(50, 4.0, epoch=1), step(60, 3.9, epoch=1)),
        {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2, 'data_time': 0.1, 'step': 1},
        *(step(110, 3.0, epoch=2), step(120, 2.9, epoch=2)),
        {'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.4, 'data_time': 0.1, 'step': 2},
    ]
    return write(tmp_path / 'detector' / '20260101_000000' / 'vis_data' / 'scalars.json', records)


def test_starts_of_a_work_dir_are_joined(by_iteration):
    run = read_run(by_iteration)
    assert run.name == 'upernet' and run.metrics == ['mIoU', 'aAcc']
    losses = [(point.iteration, point.value) for point in run.points['loss']]
    assert losses == [(50, 3.0), (100, 2.0), (150, 1.9), (200, 1.8), (250, 1.7), (300, 1.6)]
    assert run.points['mIoU'] == [
        *(Point(100, None, 20.0), Point(200, None, 30.0), Point(300, None, 40.0))
    ]


def test_epochs_are_placed_among_iterations(by_epoch):
    run = read_run(by_epoch)
    assert run.points['coco/bbox_mAP'] == [Point(60, 1, 0.1), Point(120, 2, 0.3)]
    assert [point.epoch for point in run.points['loss']] == [50 / 60, 1, 110 / 60, 2]
    assert default_keys([run]) == ['loss', 'lr', 'coco/bbox_mAP']
    assert curve(run.points['loss'], 'epoch', 2) == (
        [50 / 60, 1, 110 / 60, 2],
        pytest.approx([4.0, 3.95, 3.45, 2.95]),
    )


def test_a_line_that_is_cut_short_is_no_error_at_the_end(by_epoch):
    text = by_epoch.read_text()
    by_epoch.write_text(text + '{"lr": 0.0')
    assert len(read_run(by_epoch).points['loss']) == 4
    by_epoch.write_text('what?\n' + text)
    with pytest.raises(ValueError, match='scalars.json, line 1: not a record'):
        read_run(by_epoch)


def test_a_picture_of_two_runs(by_iteration, by_epoch, tmp_path, capsys):
    out = tmp_path / 'new' / 'both.png'
    runs = [str(by_iteration), str(by_epoch.parents[1])]
    assert main([*runs, '--out', str(out), '--smooth', '3', '--names', 'one', 'two']) == 0
    assert capsys.readouterr().out.strip() == str(out)
    width, height = Image.open(out).size
    assert width > 3 * height  # loss, lr, mIoU and AP side by side
    assert len(np.unique(np.asarray(Image.open(out).convert('RGB')).reshape(-1, 3), axis=0)) > 50
    assert main([runs[1], '--by', 'epoch', '--keys', 'loss', '--out', str(out)]) == 0
    width, height = Image.open(out).size
    assert width < 2 * height


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--keys', 'los'], "no run has 'los'; there is aAcc, loss, lr, mIoU"),
        (['--by', 'epoch'], '--by epoch: upernet counts iterations alone'),
        (['--names', 'a', 'b'], '--names has 2 names for 1 runs'),
        (['--smooth', '0'], '--smooth must be at least 1'),
        (['--out', 'curves'], '--out must end in one of .*, got curves'),
        (['--out', 'curves.doc'], '--out must end in one of .*, got curves.doc'),
    ],
)
def test_options_that_do_not_fit(by_iteration, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([str(by_iteration), *arguments])


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(SystemExit, match='is not a work dir with a training log'):
        main([str(tmp_path)])


@pytest.mark.heavy
def test_without_matplotlib_it_says_what_to_install(by_iteration):
    program = """
        import sys
        from polynext_mm.commands import main
        main(['plot', *sys.argv[1:]])
    """
    printed = python_without(
        {'matplotlib', 'torch', 'mmengine'}, program, by_iteration, succeeds=False
    )
    assert 'this needs matplotlib, which is not installed: run `pip install matplotlib`' in printed
    assert 'Traceback' not in printed
