"""The authors' parameter names and ours, as one table an arch."""

from collections.abc import Mapping

from torch import Tensor

from ..nn import ARCHS, Arch
from ..nn.ops import partner_order

# inside a stack: (ours, authors'), the authors' as (op, rest) with the op counted from the stack's first
_CONV_STACK = (
    ('mixer.proj_in.weight', (0, 'weight')),
    ('mixer.coarse_conv.weight', (1, 'weight')),
    ('mixer.fine_conv.weight', (2, 'weight')),
    ('mixer.smooth.weight', (3, '0.weight')),
    ('mixer.proj_out.weight', (3, '1.weight')),
    ('mixer.norm.weight', (3, '2.weight')),
    ('mlp.proj_in.weight', (4, 'weight')),
    ('mlp.norm.weight', (5, '0.weight')),
    ('mlp.proj_out.weight', (5, '1.weight')),
)
_ATTN_STACK = (
    ('mixer.norm.weight', (0, '0.weight')),
    ('mixer.scale_logit', (0, '1.scale')),
    ('mixer.proj_in.weight', (0, '1.qkv.weight')),
    ('mixer.q_conv.weight', (0, '1.q_conv.weight')),
    ('mixer.k_conv.weight', (0, '1.k_conv.weight')),
    ('mixer.v_conv.weight', (0, '1.v_conv.weight')),
    ('mixer.smooth.weight', (0, '1.final_conv.weight')),
    ('mixer.proj_out.weight', (0, '1.proj.weight')),
    ('mlp.proj_in.weight', (1, 'weight')),
    ('mlp.norm.weight', (2, '0.weight')),
    ('mlp.proj_out.weight', (2, '1.weight')),
)
_STACKS = {'conv': (6, _CONV_STACK), 'attn': (3, _ATTN_STACK)}
# the dimension of the inner channels in the weights of a PolyConv, which are in another order here
_INNER_CHANNELS = {
    'mixer.proj_in.weight': 0,
    'mixer.coarse_conv.weight': 0,
    'mixer.fine_conv.weight': 0,
    'mixer.smooth.weight': 0,
    'mixer.proj_out.weight': 1,
}
_CELL = (
    ('gate_logits', 'skip_weight'),
    ('scale0', 'preprocess0.scale'),
    ('scale1', 'preprocess1.scale'),
    ('norm.weight', 'postprocess.weight'),
)
_DOWNSAMPLE = {
    'sep3x3': (('depthwise.weight', '0.weight'), ('pointwise.weight', '1.weight')),
    'full3x3': (('conv.weight', 'weight'),),
}
CLASSIFIER = {
    'norm.weight': 'head.norm.weight',
    'proj.weight': 'head.proj.weight',
    'head.3.weight': 'head.fc.weight',
    'head.3.bias': 'head.fc.bias',
}
DROPOUT_RATE = 'head.2.p'  # a buffer of the authors' dropout, not a weight

# keys that tell whose file it is
AUTHORS_MARK = 'cells.0.skip_weight'
OUR_MARK = 'stages.0.cells.0.gate_logits'
# what only the released networks of another kind have, and what they are
_UNSUPPORTED = (('.gamma_hw', 'a fully polynomial network (norm "bn")'),)


def authors_to_ours(arch: Arch) -> dict[str, str]:
    """Every name of the authors' checkpoints of an arch, classifier and output norms included."""
    names = {'stem.weight': 'stem.weight'}
    cell = 0
    for stage, depth in enumerate(arch.depths):
        if stage > 0:
            for member, kind in enumerate(arch.downsampling):
                reduction = 2 * (stage - 1) + member
                names.update(
                    {
                        f'reductions.{reduction}.{theirs}': f'stages.{stage}.downsample.{member}.{ours}'
                        for ours, theirs in _DOWNSAMPLE[kind]
                    }
                )
        ops, stack_names = _STACKS[arch.mixers[stage]]
        for i in range(depth):
            theirs_cell, our_cell = f'cells.{cell}', f'stages.{stage}.cells.{i}'
            names.update(
                {f'{theirs_cell}.{theirs}': f'{our_cell}.{ours}' for ours, theirs in _CELL}
            )
            for stack in range(arch.stacks[stage]):
                names.update(
                    {
                        f'{theirs_cell}.ops.{ops * stack + op}.{rest}': f'{our_cell}.stacks.{stack}.{ours}'
                        for ours, (op, rest) in stack_names
                    }
                )
            cell += 1
        for kind in ('weight', 'bias'):
            names[f'extra_norms.{stage}.{kind}'] = f'out_norms.{stage}.{kind}'
    return names | CLASSIFIER


def is_authors(keys) -> bool:
    """Whether these (unprefixed) keys are the authors' names."""
    return AUTHORS_MARK in keys


def translate(state_dict: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """The authors' names, shapes and order of channels to ours. Names that the arch does not have stay
    as they are, for the strict check to find."""
    names = authors_to_ours(arch)
    ours = {}
    for key, value in state_dict.items():
        if key in names:
            ours[names[key]] = _reordered(_our_shape(value, key), names[key], arch, back=False)
        elif key != DROPOUT_RATE:
            ours[key] = value
    return ours


def translate_back(state_dict: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Our names, shapes and order of channels to the authors'.

    Raises:
        ValueError: For a name that is not of this arch.
    """
    names = {ours: theirs for theirs, ours in authors_to_ours(arch).items()}
    unknown = [key for key in state_dict if key not in names]
    if unknown:
        raise ValueError(f'not weights of this arch: {", ".join(unknown[:5])}')
    return {
        names[key]: _authors_shape(_reordered(value, key, arch, back=True), names[key])
        for key, value in state_dict.items()
    }


def infer_arch(state_dict: Mapping[str, Tensor]) -> str:
    """The name of the arch whose weights these (unprefixed) are, in either naming.

    Raises:
        ValueError: If they are of none that is known, saying which kind where it can be told.
    """
    stem = state_dict.get('stem.weight')
    keys = {key for key in state_dict if key.startswith(('cells.', 'reductions.', 'stages.'))}
    for name, arch in ARCHS.items():
        names = {
            k: v
            for k, v in authors_to_ours(arch).items()
            if k.startswith(('cells.', 'reductions.'))
        }
        expected = set(names if is_authors(state_dict) else names.values())
        if keys == expected and stem is not None and stem.shape[0] == arch.widths[0]:
            return name
    raise ValueError(
        unsupported(state_dict) or f'not the weights of a known arch ({", ".join(ARCHS)})'
    )


def unsupported(state_dict: Mapping[str, Tensor]) -> str | None:
    """What a released file holds that this version has no network for, or None."""
    for mark, what in _UNSUPPORTED:
        if any(key.endswith(mark) for key in state_dict):
            return f'these are the weights of {what}, which this version does not have'
    stem = state_dict.get('stem.weight')
    if is_authors(state_dict) and stem is not None and tuple(stem.shape[2:]) == (3, 3):
        return 'these are the weights of a low-resolution network (LR), which this version does not have'
    return None


def _reordered(value: Tensor, name: str, arch: Arch, back: bool) -> Tensor:
    """A weight with our name and shape, its inner channels in our order, or ``back`` in the authors'."""
    stage, _, member = name.removeprefix('stages.').partition('.cells.')
    dim = _INNER_CHANNELS.get(member.partition('.stacks.')[2].partition('.')[2])
    if dim is None or value.ndim <= dim or arch.mixers[int(stage)] != 'conv':
        return value
    order = partner_order(value.shape[dim])
    return value.index_select(dim, (order.argsort() if back else order).to(value.device))


def _is_pointwise(key: str, value: Tensor) -> bool:
    return value.ndim == 4 and value.shape[2:] == (1, 1) and not key.startswith('reductions.')


def _our_shape(value: Tensor, key: str) -> Tensor:
    """1x1 convolutions are matrices and scales are vectors here."""
    if key.endswith('.scale'):
        return value.flatten()
    return value.flatten(1) if _is_pointwise(key, value) else value


def _authors_shape(value: Tensor, key: str) -> Tensor:
    if key.endswith('.scale'):
        return value.reshape(1, -1, 1, 1)
    if value.ndim == 2 and key != 'head.3.weight':
        return value[:, :, None, None]
    return value
