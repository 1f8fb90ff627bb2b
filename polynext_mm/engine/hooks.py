"""Hooks of every config of ours: strict checkpoints, and what differs from machine to machine."""

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from torch import nn

from ..backbones import MultiScale, PolyNeXt
from ..weights import loading
from .optim import AutocastOptimWrapper


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Check whole checkpoints strictly, and fetch no ``init_cfg`` that one of them would overwrite.

    The backbone checks itself wherever it is loaded; mm only warns about all the rest. A file without
    heads (a backbone) may start a training but not an evaluation.

    Args:
        reset_mismatched_heads (bool): Let layers of the heads whose shape differs (another number of
            classes) keep their initialization. Defaults to False.
    """

    priority = 'VERY_HIGH'

    def __init__(self, reset_mismatched_heads: bool = False):
        self.reset_mismatched_heads = reset_mismatched_heads

    def before_run(self, runner: Runner) -> None:
        resumes = runner._resume and find_latest_checkpoint(runner.work_dir) is not None
        source = runner._load_from or (resumes and 'the latest checkpoint')
        for backbone in _backbones(runner.model) if source else ():
            if backbone.init_cfg:
                print_log(
                    f'{source} brings the backbone: its init_cfg is not fetched', logger='current'
                )
                backbone.init_cfg = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = _unwrapped(runner.model)
        if not isinstance(getattr(model, 'backbone', None), MultiScale):
            return
        state_dict = checkpoint['state_dict']
        # heads are of interest here; the backbone's keys are checked by the backbone
        source = getattr(state_dict, '_metadata', {}).get('', {}).get('source', runner._load_from)
        training = isinstance(runner._train_loop, BaseLoop)
        print_log(
            loading.check(
                model, state_dict, source, self.reset_mismatched_heads, evaluation=not training
            ),
            logger='current',
        )


@HOOKS.register_module()
class MachineHook(Hook):
    """Refuse before the first step what cannot work: a batch of one where BN needs more, and a per-cell
    clip whose loss is scaled by somebody who does not tell."""

    def before_train(self, runner: Runner) -> None:
        self._refuse_batch_of_one(runner)
        self._refuse_unknown_loss_scale(runner)

    @staticmethod
    def _refuse_batch_of_one(runner: Runner) -> None:
        batch_size = runner.train_dataloader.batch_size
        model = _unwrapped(runner.model)
        synced = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        if batch_size != 1 or (synced and runner.world_size > 1):
            return
        for name, module in model.named_modules():
            # mmseg's pyramid pooling: a 1x1 pool leaves BN one value a channel
            if 1 in getattr(module, 'pool_scales', ()) and any(
                isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()
            ):
                raise ValueError(
                    f'training with a batch of 1 cannot work: {name} pools each image to 1x1, and batch '
                    'normalization needs more than one value for each channel. Set '
                    'train_dataloader.batch_size=2 or more, or train on several GPUs (SyncBN)'
                )

    @staticmethod
    def _refuse_unknown_loss_scale(runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AutocastOptimWrapper) or not any(
            isinstance(backbone, PolyNeXt) and backbone.grad_clip_norm
            for backbone in _backbones(runner.model)
        ):
            return
        if isinstance(wrapper, AmpOptimWrapper) or wrapper._accumulative_counts != 1:
            raise ValueError(
                'grad_clip_norm clips gradients of the unscaled loss, and '
                f'{type(wrapper).__name__} with accumulative_counts={wrapper._accumulative_counts} '
                'scales it without telling: use '
                "optim_wrapper=dict(type='AutocastOptimWrapper', ...)"
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _backbones(model: nn.Module) -> list[MultiScale]:
    return [module for module in model.modules() if isinstance(module, MultiScale)]
