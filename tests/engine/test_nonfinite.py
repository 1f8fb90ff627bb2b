"""A loss that is not finite stops the training and says where to look."""

import re

import pytest
import torch

from polynext_mm.compat.torch_features import FLOAT16_ON_CPUS
from polynext_mm.engine import NonFiniteError, NonFiniteHook
from polynext_mm.engine.checkpoints.saving import newest_checkpoint
from polynext_mm.weights import CheckpointError
from tests.engine.runs import At, config, saved, train
from tests.marks import needs

BROKEN = 'backbone.stages.2.cells.0'


def breaks_at(iteration):
    """Let a module give nan in training from an iteration on."""

    def act(runner):
        def nan(module, arguments, output):
            return torch.full_like(output, torch.nan) if module.training else None

        runner.model.get_submodule(BROKEN).register_forward_hook(nan)

    return At('before_train_iter', iteration - 1, act)


def inf_loss_at(iteration):
    """Let the loss of one iteration be inf."""

    def act(runner):
        head = runner.model.decode_head
        plain = head.loss_by_feat

        def loss_by_feat(*arguments):
            factor = torch.inf if runner.iter == iteration - 1 else 1.0
            return {key: value * factor for key, value in plain(*arguments).items()}

        head.loss_by_feat = loss_by_feat

    return At('before_train_iter', iteration - 1, act)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('task', 'interval', 'stopped'), [('segmentation', 2, 4), ('detection', 100, 5)]
)
def test_the_run_stops_and_names_iteration_files_and_module(tmp_path, task, interval, stopped):
    """After three iterations, or when weights that are lost would be saved."""
    options = {'default_hooks.checkpoint.interval': interval, 'train_cfg.val_interval': 100}
    with pytest.raises(NonFiniteError) as caught:
        train(config(task, tmp_path, **(dict(iters=9) | options)), hooks=[breaks_at(3)])
    message = str(caught.value)
    assert f'since iteration 3, {stopped - 2} iterations in a row' in message
    assert f'first output that is not finite: {BROKEN} (' in message
    assert len(re.findall(r'/few_scenes_\S+\.jpg', message)) == 2
    assert len(message.splitlines()) == 1
    state = tmp_path / f'nonfinite_iter_{stopped}.pth'
    assert str(state) in message
    assert saved(state)['meta']['nonfinite']['since'] == 3
    # nothing broken was saved as last or best
    assert [path.name for path in tmp_path.glob('*.pth') if path != state] == (
        ['iter_2.pth'] if interval == 2 else []
    )


@pytest.mark.heavy
def test_a_validation_saves_no_broken_best(tmp_path):
    with pytest.raises(NonFiniteError, match='since iteration 3, 1 iterations in a row'):
        train(config('segmentation', tmp_path), hooks=[breaks_at(3)])
    assert not list(tmp_path.glob('best_*'))
    assert newest_checkpoint(tmp_path).path == tmp_path / 'iter_2.pth'


@pytest.mark.heavy
def test_a_broken_state_is_not_resumed_under_any_name(tmp_path):
    options = {
        'custom_hooks': [dict(type='WorkDirHook'), dict(type='NonFiniteHook', patience=1)],
        'train_cfg.val_interval': 100,
    }
    with pytest.raises(NonFiniteError):
        train(config('segmentation', tmp_path, **options), hooks=[breaks_at(1)])
    state = tmp_path / 'nonfinite_iter_1.pth'
    with pytest.raises(CheckpointError, match='cannot be resumed from'):
        train(config('segmentation', tmp_path), resume=state)
    renamed = state.rename(tmp_path / 'iter_8.pth')
    for named in (renamed, True):
        with pytest.raises(CheckpointError):
            train(config('segmentation', tmp_path), resume=named)


@pytest.mark.heavy
@needs(FLOAT16_ON_CPUS)
def test_fewer_in_a_row_than_the_patience_are_no_fault(tmp_path):
    """As of loss scaling, whose optimizer steps over the gradients of such an iteration."""
    options = {
        'optim_wrapper.dtype': 'float16',
        'optim_wrapper.clip_grad': None,
        'train_cfg.val_interval': 100,
    }
    runner = train(config('segmentation', tmp_path, iters=4, **options), hooks=[inf_loss_at(2)])
    assert runner.iter == 4
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'The loss of iteration 2 is not finite' in log
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())


@pytest.mark.heavy
def test_weights_that_are_not_finite_are_never_saved_as_last(tmp_path):
    def spoil(runner):
        runner.model.decode_head.conv_seg.bias.data[0] = torch.inf

    options = {'custom_hooks': [dict(type='WorkDirHook')]}
    with pytest.raises(NonFiniteError, match='decode_head.conv_seg.bias'):
        train(config('segmentation', tmp_path, **options), hooks=[At('after_train_iter', 3, spoil)])
    assert (tmp_path / 'nonfinite_iter_4.pth').is_file()
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_3.pth')
    assert newest_checkpoint(tmp_path).path == tmp_path / 'iter_3.pth'


@pytest.mark.heavy
def test_looking_changes_nothing(tmp_path):
    """The hook draws no random numbers and leaves buffers alone."""
    runs = []
    for hooks in ([], [dict(type='NonFiniteHook')]):
        work_dir = tmp_path / str(len(hooks))
        options = {'custom_hooks': [dict(type='ReproducibilityHook'), *hooks]}
        train(config('segmentation', work_dir, iters=2, **options))
        runs.append(saved(work_dir / 'iter_2.pth')['state_dict'])
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize('patience', [0, -1, 1.5, True])
def test_patience_is_a_count(patience):
    with pytest.raises(ValueError, match='patience'):
        NonFiniteHook(patience=patience)
