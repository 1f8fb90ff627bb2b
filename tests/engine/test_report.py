"""What a training leaves in report/: curves, tables of the classes, pictures."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import PixelData
from PIL import Image

from polynext_mm import drawing
from polynext_mm.engine import report
from polynext_mm.engine.checkpoints.work_dir import REPORT
from tests.engine.runs import config, train

pytestmark = pytest.mark.heavy
CLASSES = ['brick', 'grass', 'gravel', 'coins', 'galaxies', 'trees']
FILES = {
    'segmentation': ['classes.csv', 'confusion.csv', 'confusion.png', 'curves.png', 'pictures.png'],
    'detection': ['classes.csv', 'curves.png', 'pictures.png'],
}


def configured(task: str, work_dir: Path, **settings):
    cfg = config(task, work_dir, report=True, **{'default_hooks.logger.interval': 1, **settings})
    cfg.visualizer.name = cfg.experiment_name  # else mmengine takes that of an earlier training
    return cfg


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open()))


def logged(work_dir: Path) -> list[dict]:
    lines = [
        line
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory):
    """Work dirs of a training of each task, its only validation at its end."""
    places = {}
    for task in FILES:
        places[task] = tmp_path_factory.mktemp(task)
        # CocoMetric counts all images of its file
        images = 3 if task == 'segmentation' else None
        settings = {'train_cfg.val_interval': 2, 'val_dataloader.dataset.indices': images}
        train(configured(task, places[task], iters=2, **settings))
    return places


@pytest.mark.parametrize('task', FILES)
def test_a_training_leaves_curves_tables_and_pictures(work_dirs, task):
    folder = work_dirs[task] / REPORT
    assert sorted(path.name for path in folder.iterdir()) == FILES[task]
    for path in folder.glob('*.png'):
        picture = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
        assert len(np.unique(picture, axis=0)) > 20, path


def test_iou_by_class_is_that_of_the_log(work_dirs):
    work_dir = work_dirs['segmentation']
    head, *rows = table(work_dir / REPORT / 'classes.csv')
    assert head == ['class', 'IoU', 'Acc', 'pixels']
    assert [row[0] for row in rows] == CLASSES
    result = logged(work_dir)[-1]
    for column, key in ((1, 'mIoU'), (2, 'mAcc')):
        values = [float(row[column]) for row in rows if row[column]]
        assert np.mean(values) == pytest.approx(result[key], abs=0.02)
    names, *counted = table(work_dir / REPORT / 'confusion.csv')
    counts = np.array([row[1:] for row in counted], int)
    assert names[1:] == [row[0] for row in counted] == CLASSES
    assert counts.sum(1).tolist() == [int(row[3]) for row in rows]
    assert 100 * counts.trace() / counts.sum() == pytest.approx(result['aAcc'], abs=0.01)


def test_ap_by_class_is_in_the_table_and_not_in_the_log(work_dirs):
    work_dir = work_dirs['detection']
    head, *rows = table(work_dir / REPORT / 'classes.csv')
    assert head == ['class', 'AP', 'objects']
    assert [row[0] for row in rows] == CLASSES
    assert all((row[1] == '') == (row[2] == '0') for row in rows)
    result = logged(work_dir)[-1]
    assert 'coco/bbox_mAP' in result and not any('precision' in key for key in result)
    values = [float(row[1]) for row in rows if row[1]]
    assert np.mean(values) == pytest.approx(result['coco/bbox_mAP'], abs=0.002)


def test_a_metric_that_computes_ap_by_class_anyway_is_left_alone(tmp_path):
    settings = {'val_evaluator.classwise': True, 'train_cfg.val_interval': 1}
    train(configured('detection', tmp_path, iters=1, **settings))
    assert 'coco/brick_precision' in logged(tmp_path)[-1]


def test_it_is_of_the_best_checkpoint_and_resuming_keeps_it(tmp_path, monkeypatch):
    """The second validation and that of the resumed training are worse than the first."""
    scores, evaluate = iter([50.0, 40.0, 30.0]), Evaluator.evaluate
    monkeypatch.setattr(Evaluator, 'evaluate', lambda *a: evaluate(*a) | dict(mIoU=next(scores)))
    cfg = configured('segmentation', tmp_path, iters=2, **{'train_cfg.val_interval': 1})
    train(cfg)
    folder = tmp_path / REPORT
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    cfg = configured('segmentation', tmp_path, iters=3, **{'train_cfg.val_interval': 3})
    runner = train(cfg, resume=True)
    assert runner.message_hub.get_info('best_score') == 50.0
    for name, content in first.items():
        assert ((folder / name).read_bytes() == content) == (name != 'curves.png'), name


def test_a_training_that_does_not_resume_keeps_the_earlier_report_aside(tmp_path):
    for _ in range(2):
        train(configured('segmentation', tmp_path, iters=1, **{'train_cfg.val_interval': 1}))
    for folder in (tmp_path / REPORT, tmp_path / 'earlier_1' / REPORT):
        assert sorted(path.name for path in folder.iterdir()) == FILES['segmentation']


def test_a_training_that_does_not_validate_has_curves(tmp_path):
    cfg = configured('segmentation', tmp_path, iters=2)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    train(cfg)
    assert [path.name for path in (tmp_path / REPORT).iterdir()] == ['curves.png']


def test_a_report_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(drawing, 'sheet', refuse)
    runner = train(configured('segmentation', tmp_path, iters=2, **{'train_cfg.val_interval': 1}))
    assert runner.iter == 2 and list(tmp_path.glob('best_mIoU_iter_*.pth'))
    printed = capfd.readouterr().out
    # at both validations and at the end
    complaint = 'the report is not complete: OSError: [Errno 28] No space left on device'
    assert printed.count(complaint) == 3
    assert 'Traceback' in printed


def test_a_folder_that_cannot_be_written_stops_the_training_before_its_first_step(tmp_path):
    (tmp_path / REPORT).write_text('a file')
    cfg = configured('segmentation', tmp_path, iters=1)
    with pytest.raises(FileExistsError):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))


class Sample(dict):
    """Of a segmentor, of one class, and right."""

    img_shape = (4, 4)

    @property
    def pred_sem_seg(self) -> PixelData:
        return PixelData(data=torch.zeros(1, 4, 4, dtype=torch.long))

    gt_sem_seg = pred_sem_seg


class Dataset(list):
    metainfo = dict(classes=('a', 'b'))


def test_processes_count_each_image_once(monkeypatch):
    """As mm does: the last batches repeat the first images, for equal shares."""
    runner = SimpleNamespace(
        val_dataloader=SimpleNamespace(dataset=Dataset(range(3))),
        val_loop=SimpleNamespace(evaluator=SimpleNamespace(metrics=[])),
    )
    sample = Sample(pred_sem_seg=1, gt_sem_seg=1)
    counted, places = np.zeros((2, 2), int), set()
    monkeypatch.setattr(report.dist, 'get_world_size', lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(report.dist, 'get_rank', lambda rank=rank: rank)
        tally = report._Tally(runner, pictures=8)
        for _ in range(2):
            tally.add(dict(inputs=[torch.zeros(3, 4, 4, dtype=torch.uint8)]), [sample])
        counted += tally.part().counts
        places |= set(tally.part().pictures)
    assert counted.tolist() == [[3 * 16, 0], [0, 0]] and places == {0, 1, 2}
