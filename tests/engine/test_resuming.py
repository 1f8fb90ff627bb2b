"""A resumed run equals the uninterrupted one, bit for bit."""

import shutil

import pytest
from runs import config, differences, saved, train

pytestmark = pytest.mark.usefixtures('quick_configs')

# task, by epoch, workers
KINDS = [
    ('segmentation', False, 0),
    ('segmentation', True, 2),
    ('detection', False, 2),
    ('detection', True, 0),
]


def settings(task, by_epoch, workers):
    return dict(
        task=task,
        by_epoch=by_epoch,
        iters=3 if by_epoch else 6,
        **{
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': workers > 0,
        },
    )


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_every_checkpoint_leads_to_the_same_end(tmp_path, kind):
    whole = train(config(work_dir=tmp_path / 'whole', **settings(*kind)))
    last, *earlier = (
        ('epoch_3', 'epoch_2', 'epoch_1') if kind[1] else ('iter_6', 'iter_4', 'iter_2')
    )
    expected = saved(tmp_path / 'whole' / f'{last}.pth')
    assert expected['meta']['iter'] == 6
    for name in earlier:
        work_dir = tmp_path / name
        work_dir.mkdir()
        shutil.copy(tmp_path / 'whole' / f'{name}.pth', work_dir)
        resumed = train(config(work_dir=work_dir, **settings(*kind)), resume=True)
        assert differences(saved(work_dir / f'{last}.pth'), expected) == []
        assert resumed.message_hub.get_info('best_score') == whole.message_hub.get_info(
            'best_score'
        )
