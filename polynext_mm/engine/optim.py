"""Parameter groups of the published recipe, and mixed precision on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from ..backbones.multiscale import MultiScale
from ..backbones.polynext import PolyNeXt
from ..compat import torch_features
from ..compat.logs import say
from ..nn import batch_norm, layers
from . import models

# 'released' follows the authors' code, which produced the published numbers; the paper exempts all
# norms from weight decay.
_NO_DECAY = ('released', 'paper')
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    layers.LayerNorm,
    batch_norm.PositionNorm,
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PolyNeXtOptimWrapperConstructor:
    """Build an optimizer wrapper with one parameter group per learning rate and weight decay.

    There are as few groups as possible, since a step launches kernels for each. They are logged.
    Every PolyNeXt or MetaFormer in the model is a backbone, whatever its name; everything else is a
    head.

    Checkpoints of any implementation of the optimizer can be resumed: ``fused`` and ``foreach``
    stay as the config has them. Options of ``paramwise_cfg``:

    - ``no_decay``: 'released' (default) exempts a backbone's output norms and learned scales from
      weight decay: skip scales, gates and attention scales of a PolyNeXt, residual scales and
      activations of a MetaFormer. 'paper' exempts all norms of the model as well.
    - ``embedding_decay``: Whether ``nn.Embedding`` decays, such as the queries of Mask2Former,
      whose recipe exempts them. True by default.
    - ``head_lr_mult``: Factor on the learning rate of everything but the backbone, 1 by default.
    - ``layer_decay_rate``: Factor on the learning rate of the backbone, applied once per cell
      (block of a MetaFormer) between a parameter and the output, or None (default).

    Args:
        optim_wrapper_cfg: Config of the wrapper; its ``optimizer`` has ``lr`` and ``weight_decay``.
        paramwise_cfg: The options above.

    Raises:
        ValueError: If an option is unknown or invalid, or the model has no PolyNeXt or MetaFormer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.optim_wrapper_cfg = optim_wrapper_cfg.copy()
        (
            self.no_decay,
            self.embedding_decay,
            self.head_lr_mult,
            self.layer_decay_rate,
        ) = _options(**(paramwise_cfg or {}))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, 'module', model)
        wrapper_cfg = self.optim_wrapper_cfg.copy()
        wrapper_cfg.setdefault('type', 'OptimWrapper')
        optimizer_cfg = wrapper_cfg.pop('optimizer').copy()
        groups = self.groups(model, optimizer_cfg['lr'], optimizer_cfg.get('weight_decay', 0.0))
        print_log(_table(groups), logger='current')
        optimizer_cfg['params'] = [
            {key: group[key] for key in ('params', 'lr', 'weight_decay')} for group in groups
        ]
        device = groups[0]['params'][0].device.type if groups else 'cpu'
        if optimizer_cfg.get('fused') and not torch_features.has_fused_optimizers(device):
            print_log(f'{device} has no fused optimizer with this torch: fused=False', 'current')
            optimizer_cfg['fused'] = False
        optimizer = OPTIMIZERS.build(optimizer_cfg)
        optimizer.register_load_state_dict_pre_hook(_keep_implementation)
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args=dict(optimizer=optimizer))

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
        """Return groups with ``params``, their ``names``, ``lr`` and ``weight_decay``."""
        backbones = {f'{name}.' if name else '': b for name, b in models.backbones(model).items()}
        if not backbones:
            raise ValueError(
                f'{type(self).__name__} is for models with a PolyNeXt or a MetaFormer, and '
                f'{type(model).__name__} has none: set the type of its backbone to one of these, '
                'or remove optim_wrapper.constructor and paramwise_cfg from the config'
            )
        exempt = self._exempt(model, backbones)
        groups: dict[tuple, dict] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            key = (lr * self._lr_mult(name, backbones), 0.0 if name in exempt else weight_decay)
            group = groups.setdefault(
                key, dict(params=[], names=[], lr=key[0], weight_decay=key[1])
            )
            group['params'].append(param)
            group['names'].append(name)
        return list(groups.values())

    def _lr_mult(self, name: str, backbones: Mapping[str, MultiScale]) -> float:
        prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
        if prefix is None:
            return self.head_lr_mult
        if self.layer_decay_rate is None:
            return 1.0
        depth, total = backbones[prefix].get_layer_depth(name, prefix)
        return self.layer_decay_rate ** (total - 1 - depth)

    def _exempt(self, model: nn.Module, backbones: Mapping[str, MultiScale]) -> set[str]:
        """Return the names of the parameters without weight decay."""
        exempt = {
            prefix + name
            for prefix, backbone in backbones.items()
            for name, _ in backbone.named_parameters()
            if name.endswith(backbone.scales) or name.startswith('out_norms.')
        }
        kinds = _NORMS if self.no_decay == 'paper' else ()
        if not self.embedding_decay:
            kinds += (nn.Embedding,)
        return exempt | {
            f'{name}.{param}'
            for name, module in model.named_modules()
            if isinstance(module, kinds)
            for param, _ in module.named_parameters(recurse=False)
        }


def _keep_implementation(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Keep the config's choice of ``fused`` and ``foreach`` when an optimizer state is loaded.

    Otherwise a checkpoint from before ``fused=True`` would turn it off only halfway: loss scaling
    would still leave unscaling to the optimizer.
    """
    groups = [
        loaded | {key: own[key] for key in ('fused', 'foreach') if key in own}
        for loaded, own in zip(state_dict['param_groups'], optimizer.param_groups)
    ]
    if len(groups) != len(state_dict['param_groups']):  # torch reports that
        return state_dict
    return state_dict | {'param_groups': groups}


def _options(
    no_decay: str = 'released',
    embedding_decay: bool = True,
    head_lr_mult: float = 1.0,
    layer_decay_rate: float | None = None,
    **unknown,
) -> tuple:
    if unknown:
        raise ValueError(
            f'paramwise_cfg: unknown {", ".join(unknown)}; the options are no_decay, '
            'embedding_decay, head_lr_mult and layer_decay_rate'
        )
    if no_decay not in _NO_DECAY:
        raise ValueError(f'paramwise_cfg: no_decay must be one of {_NO_DECAY}, got {no_decay!r}')
    if not isinstance(embedding_decay, bool):
        raise ValueError(
            f'paramwise_cfg: embedding_decay must be True or False, got {embedding_decay!r}'
        )
    if not head_lr_mult > 0:
        raise ValueError(f'paramwise_cfg: head_lr_mult must be positive, got {head_lr_mult!r}')
    if layer_decay_rate is not None and not 0 < layer_decay_rate <= 1:
        raise ValueError(
            'paramwise_cfg: layer_decay_rate must be within (0, 1] or None, '
            f'got {layer_decay_rate!r}'
        )
    return no_decay, embedding_decay, head_lr_mult, layer_decay_rate


def _table(groups: list[dict]) -> str:
    lines = [
        'Parameter groups:',
        f'{"lr":>10} {"decay":>8} {"tensors":>8} {"parameters":>11}  e.g.',
    ]
    for group in groups:
        count = sum(param.numel() for param in group['params'])
        lines.append(
            f'{group["lr"]:>10.3g} {group["weight_decay"]:>8.3g} {len(group["params"]):>8} '
            f'{count:>11,}  {group["names"][0]}'
        )
    return '\n'.join(lines)


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Mixed precision on every device that has autocast, CPUs included.

    mmengine's AmpOptimWrapper refuses CPUs and scales the loss for bfloat16 too, which does not
    need it; the per-cell gradient clip would cut every scaled gradient to almost nothing. This
    wrapper scales the loss for float16 only, and tells the backbone the factor. On a GPU or CPU
    without native bfloat16, it trains in float32 and logs that.

    With a fused optimizer, the host queues the whole step without waiting for the device; with
    ``clip_grad``, the norm is read for the log only afterwards.

    Args:
        optimizer: The optimizer.
        dtype: 'bfloat16', 'float16' or 'float32'.
        loss_scale: Initial loss scale for float16, which is then adapted.
        accumulative_counts: Number of iterations whose gradients are summed for a step.
        clip_grad: Arguments of gradient clipping, as for mmengine's OptimWrapper. Norms are those
            of the unscaled gradients.
        modules: Names of the submodules to run under autocast, such as ``('backbone', 'neck')``.
            Their outputs are cast to float32, and everything else is computed in float32. Detectors
            need that, since bfloat16 rounds the coordinates of boxes to 8 bits. None runs the whole
            model under autocast.

    Raises:
        ValueError: If ``dtype`` is unknown, or, in training, if the model has no submodule of a
            name in ``modules``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: str = 'bfloat16',
        loss_scale: float = 65536.0,
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
        modules: Sequence[str] | None = None,
    ):
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad)
        dtypes = ('bfloat16', 'float16', 'float32')
        if dtype not in dtypes:
            raise ValueError(f'dtype must be one of {dtypes}, got {dtype!r}')
        device = self.param_groups[0]['params'][0].device.type
        self.device_type = device
        self.cast_dtype = getattr(torch, dtype)
        if dtype != 'float32' and not torch_features.can_autocast_to(device, self.cast_dtype):
            say(f'this {device} has no fast {dtype}: training in float32')
            self.cast_dtype = torch.float32
        self.loss_scaler = torch_features.grad_scaler(
            device, init_scale=loss_scale, enabled=self.cast_dtype is torch.float16
        )
        self.modules = modules
        self._clipping: list[PolyNeXt] = []

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        self._clipping = [
            m for m in model.modules() if isinstance(m, PolyNeXt) and m.grad_clip_norm is not None
        ]
        if self._clipping:
            factor = self._factor_on_the_loss()
            for backbone in self._clipping:
                backbone.set_loss_scale(factor)
        with super().optim_context(model), self._autocast(model):
            yield

    def _factor_on_the_loss(self) -> float | Tensor:
        """Return the factor as a number, or, with loss scaling, as a tensor on the device."""
        factor = self.scale_loss(1.0)
        if not self.loss_scaler.is_enabled():
            return factor
        device = self.param_groups[0]['params'][0].device
        return self.loss_scaler.scale(torch.full((), factor, device=device))

    def _autocast(self, model: nn.Module) -> contextlib.AbstractContextManager:
        if self.cast_dtype is torch.float32:
            return contextlib.nullcontext()
        if self.modules is None:
            return torch.autocast(self.device_type, self.cast_dtype)
        model = getattr(model, 'module', model)
        parts = dict(model.named_modules())
        for name in self.modules:
            if name not in parts:
                raise ValueError(
                    f'modules: {type(model).__name__} has no {name!r}; its parts are '
                    f'{", ".join(name for name, _ in model.named_children())}'
                )
        return _autocast_within(
            [parts[name] for name in self.modules], self.device_type, self.cast_dtype
        )

    def backward(self, loss: Tensor, **kwargs) -> None:
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        norm = None
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            norm = self._clipped_norm()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()
        if norm is not None:
            self.message_hub.update_scalar(f'train/{self.grad_name}', norm.item())

    def _clipped_norm(self) -> Tensor | None:
        """Clip as mmengine's wrapper does, but return the norm without waiting for the device."""
        params = [param for group in self.optimizer.param_groups for param in group['params']]
        params = [param for param in params if param.grad is not None]
        return self.clip_func(params, **self.clip_grad_kwargs) if params else None

    def state_dict(self) -> dict:
        state_dict = super().state_dict()
        if self.loss_scaler.is_enabled():
            state_dict['loss_scaler'] = self.loss_scaler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = state_dict.copy()
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.loss_scaler.is_enabled():
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


@contextlib.contextmanager
def _autocast_within(
    modules: Sequence[nn.Module], device: str, dtype: torch.dtype
) -> Iterator[None]:
    """Autocast only the calls of ``modules``, and cast what they return to float32."""
    entered = []

    def enter(module, args):
        entered.append(torch.autocast(device, dtype))
        entered[-1].__enter__()

    def leave(module, args, output):
        entered.pop().__exit__(None, None, None)
        return _float32(output)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            # always_call: autocast must not outlive a forward that raises
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _float32(output):
    """Return a tensor, or a nested container of tensors, with half precision cast to float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Mapping):
        return type(output)((key, _float32(value)) for key, value in output.items())
    if isinstance(output, (tuple, list)):
        return type(output)(map(_float32, output))
    return output
