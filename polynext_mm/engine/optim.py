"""The optimizer of the published recipe: parameter groups, and mixed precision on what is there."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from ..backbones import MultiScale, PolyNeXt

# The released code made the published numbers; the paper says that all norms are exempt.
_NO_DECAY = ('released', 'paper')
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PolyNeXtOptimWrapperConstructor:
    """Build the optimizer wrapper with one parameter group for each learning rate and decay.

    Args:
        optim_wrapper_cfg (dict): Of the wrapper; its ``optimizer`` has ``lr`` and ``weight_decay``.
        paramwise_cfg (dict | None): Of

            - ``no_decay``: 'released' (default) exempts the backbone's output norms and learned scales
              (of a PolyNeXt skip scales, gates and attention scales; of a MetaFormer residual scales
              and activations) from decay; 'paper' all norms of the model besides.
            - ``head_lr_mult`` (float): On the learning rate of all that is not backbone. Defaults to 1.
            - ``layer_decay_rate`` (float | None): On the learning rate of the backbone, once for every
              cell (of a MetaFormer: block) between a parameter and the output. Defaults to None.

    Raises:
        ValueError: For an unknown option or value, or a model whose ``backbone`` is neither a PolyNeXt
            nor a MetaFormer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        self.optim_wrapper_cfg = optim_wrapper_cfg.copy()
        self.no_decay, self.head_lr_mult, self.layer_decay_rate = _options(**(paramwise_cfg or {}))

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
        return OPTIM_WRAPPERS.build(
            wrapper_cfg, default_args=dict(optimizer=OPTIMIZERS.build(optimizer_cfg))
        )

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
        """Parameter groups with ``params``, ``names``, ``lr`` and ``weight_decay``."""
        backbone = getattr(model, 'backbone', None)
        if not isinstance(backbone, MultiScale):
            raise ValueError(
                f'{type(self).__name__} is for models whose backbone is a PolyNeXt or a MetaFormer, '
                f'got {type(backbone).__name__}'
            )
        exempt = self._exempt(model)
        groups: dict[tuple, dict] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            key = (lr * self._lr_mult(name, backbone), 0.0 if name in exempt else weight_decay)
            group = groups.setdefault(
                key, dict(params=[], names=[], lr=key[0], weight_decay=key[1])
            )
            group['params'].append(param)
            group['names'].append(name)
        return list(groups.values())

    def _lr_mult(self, name: str, backbone: MultiScale) -> float:
        if not name.startswith('backbone.'):
            return self.head_lr_mult
        if self.layer_decay_rate is None:
            return 1.0
        depth, total = backbone.get_layer_depth(name)
        return self.layer_decay_rate ** (total - 1 - depth)

    def _exempt(self, model: nn.Module) -> set[str]:
        """Names of the parameters without decay."""
        exempt = {
            name
            for name, _ in model.backbone.named_parameters(prefix='backbone')
            if name.endswith(model.backbone.scales) or '.out_norms.' in name
        }
        if self.no_decay == 'paper':
            exempt |= {
                f'{name}.{param}'
                for name, module in model.named_modules()
                if isinstance(module, _NORMS) or type(module).__name__ == 'LayerNorm'
                for param, _ in module.named_parameters(recurse=False)
            }
        return exempt


def _options(
    no_decay: str = 'released',
    head_lr_mult: float = 1.0,
    layer_decay_rate: float | None = None,
    **unknown,
) -> tuple:
    if unknown:
        raise ValueError(
            f'paramwise_cfg: unknown {", ".join(unknown)}; the options are no_decay, '
            'head_lr_mult and layer_decay_rate'
        )
    if no_decay not in _NO_DECAY:
        raise ValueError(f'paramwise_cfg: no_decay must be of {_NO_DECAY}, got {no_decay!r}')
    if not head_lr_mult > 0:
        raise ValueError(f'paramwise_cfg: head_lr_mult must be positive, got {head_lr_mult!r}')
    if layer_decay_rate is not None and not 0 < layer_decay_rate <= 1:
        raise ValueError(
            'paramwise_cfg: layer_decay_rate must be within (0, 1] or None, '
            f'got {layer_decay_rate!r}'
        )
    return no_decay, head_lr_mult, layer_decay_rate


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
    """Mixed precision wherever autocast exists, the CPU included.

    mmengine's AmpOptimWrapper refuses the CPU and scales the loss even for bfloat16, which needs no
    scaling and would make every per-cell clip cut to nothing. This one scales for float16 alone, and
    tells PolyNeXt the scale. A GPU without bfloat16 trains in float32, and the log says so.

    Args:
        optimizer (torch.optim.Optimizer): As of OptimWrapper.
        dtype (str): 'bfloat16', 'float16' or 'float32'. Defaults to 'bfloat16'.
        loss_scale (float): Initial scale for float16; it is adapted. Defaults to 65536.
        accumulative_counts (int): As of OptimWrapper. Defaults to 1.
        clip_grad (dict | None): As of OptimWrapper; norms are of the unscaled gradients.
        modules (Sequence[str] | None): Names of the parts of the model to autocast, such as
            ``('backbone', 'neck')``: what they return is cast to float32, and all the rest is computed
            in float32. Detectors need that, for a box in bfloat16 is rounded to 8 bits. Defaults to
            None: the whole model.

    Raises:
        ValueError: For another dtype, and in training for a name that the model does not have.
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
        if dtype != 'float32' and not _can_autocast(device, dtype):
            print_log(f'{device} has no {dtype} autocast: training in float32', logger='current')
            self.cast_dtype = torch.float32
        self.loss_scaler = torch.amp.GradScaler(
            device, init_scale=loss_scale, enabled=self.cast_dtype is torch.float16
        )
        self.modules = modules
        self._clipping: list[PolyNeXt] = []

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        self._clipping = [
            m for m in model.modules() if isinstance(m, PolyNeXt) and m.grad_clip_norm is not None
        ]
        factor = self.scale_loss(torch.ones(())).item() * self.loss_scaler.get_scale()
        for backbone in self._clipping:
            backbone.set_loss_scale(factor)
        with super().optim_context(model), self._autocast(model):
            yield

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
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()

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
    """Autocast in the calls of ``modules`` alone; what they return is float32."""
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
            # always: autocast must not outlive a forward that raises
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def _float32(output):
    """The same tensors, or containers of tensors, with those in half precision cast."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Mapping):
        return type(output)((key, _float32(value)) for key, value in output.items())
    if isinstance(output, (tuple, list)):
        return type(output)(map(_float32, output))
    return output


def _can_autocast(device: str, dtype: str) -> bool:
    if not torch.amp.is_autocast_available(device):
        return False
    if device == 'cuda' and dtype == 'bfloat16':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
