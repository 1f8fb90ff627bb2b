"""Parameter names: the authors', ours, and what training frameworks put in front of either.

This holds all differences between the authors' checkpoints and ours: names (one table per arch and
norm), shapes (here a 1x1 convolution is a matrix, a scale a vector, and a norm's values for every
position a table (..., H, W)) and the order of PolyConv's inner channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from ..nn import ARCHS, Arch
from ..nn.ops import partner_order
from .errors import shown

Value = TypeVar('Value')

#: The prefix of the backbone's names in mmseg and mmdet.
BACKBONE = 'backbone.'

# Inside a stack: our name, then the authors' as (op, rest), with ops counted within the stack.
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
# By mixer: the number of the authors' ops in a stack, and their names.
_STACKS = {'conv': (6, _CONV_STACK), 'attn': (3, _ATTN_STACK)}
# By weight: the dimension of PolyConv's inner channels, which have another order here.
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
#: The ImageNet classifier: the authors' names to ours.
CLASSIFIER = {
    'norm.weight': 'head.norm.weight',
    'proj.weight': 'head.proj.weight',
    'head.3.weight': 'head.fc.weight',
    'head.3.bias': 'head.fc.bias',
}
#: A buffer in the authors' files: the rate of their dropout, not a weight.
DROPOUT_RATE = 'head.2.p'

# What a fully polynomial network (norm 'bn') has instead of the weight of an LN.
_BATCH_NORM = (
    ('weight', 'gamma_c'),
    ('position_weight', 'gamma_hw'),
    ('running_mean', 'running_mean'),
    ('running_var', 'running_var'),
    ('num_batches_tracked', 'num_batches_tracked'),
)
# What its attention has in addition: a norm instead of row sums, and one before the last matrix.
_ROW_NORM = (
    ('mixer.row_norm.weight', (0, '1.norm.gamma')),
    ('mixer.row_norm.running_sum', (0, '1.norm.running_denom')),
    ('mixer.row_norm.num_batches_tracked', (0, '1.norm.num_batches_tracked')),
    *((f'mixer.smooth_norm.{ours}', (0, f'1.norm2.{theirs}')) for ours, theirs in _BATCH_NORM),
)
# Endings of the authors' names of values for each position, or query.
_PER_POSITION = ('gamma_hw', 'running_mean', 'running_var')
_PER_QUERY = ('.norm.gamma', '.norm.running_denom')

# A key that every backbone has, in the authors' names and in ours.
_AUTHORS_MARK = 'cells.0.skip_weight'
_OUR_MARK = 'stages.0.cells.0.gate_logits'
# A key that every fully polynomial backbone has, in the authors' names and in ours.
_BATCH_NORM_MARKS = ('cells.0.postprocess.gamma_hw', 'stages.0.cells.0.norm.position_weight')


def norm_of(keys: Collection[str]) -> str:
    """Return the norm, 'ln' or 'bn', of a network, from its keys without a prefix."""
    return 'bn' if any(mark in keys for mark in _BATCH_NORM_MARKS) else 'ln'


def norm_size(state_dict: Mapping[str, Tensor], arch: Arch) -> tuple[int, int] | None:
    """Return the height and width of the images that the norms are for; None for LN."""
    for mark in _BATCH_NORM_MARKS:
        if mark in state_dict and state_dict[mark].ndim > 1 and state_dict[mark].numel():
            height, width = state_dict[mark].shape[-2:]
            return height * arch.stem_stride, width * arch.stem_stride
    return None


def authors_to_ours(arch: Arch, norm: str = 'ln') -> dict[str, str]:
    """Return our name for every name in the authors' checkpoints of an arch.

    Classifier and output norms are included.

    Args:
        arch: The network's arch.
        norm: 'ln', or 'bn' for a fully polynomial network.
    """
    names = _names_with_ln(arch, norm)
    return names if norm == 'ln' else dict(_with_batch_norms(names))


def _with_batch_norms(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for theirs, ours in names.items():
        of_output = ours.startswith('out_norms.') and ours.endswith('.weight')
        if ours.endswith('.norm.weight') or of_output:
            for our_part, their_part in _BATCH_NORM:
                yield (
                    theirs.removesuffix('weight') + their_part,
                    ours.removesuffix('weight') + our_part,
                )
        else:
            yield theirs, ours


def _names_with_ln(arch: Arch, norm: str) -> dict[str, str]:
    names = {'stem.weight': 'stem.weight'}
    cell = 0
    for stage, depth in enumerate(arch.depths):
        if stage > 0:
            names.update(_downsampling_names(arch, stage))
        for i in range(depth):
            our_cell = f'stages.{stage}.cells.{i}.'
            names.update(_cell_names(arch, norm, stage, f'cells.{cell}.', our_cell))
            cell += 1
        for kind in ('weight', 'bias'):
            names[f'extra_norms.{stage}.{kind}'] = f'out_norms.{stage}.{kind}'
    return names | CLASSIFIER


def _downsampling_names(arch: Arch, stage: int) -> Iterator[tuple[str, str]]:
    """Yield the authors' names and ours of the convolutions in front of a stage."""
    for member, kind in enumerate(arch.downsampling):
        reduction = f'reductions.{2 * (stage - 1) + member}.'
        for ours, theirs in _DOWNSAMPLE[kind]:
            yield reduction + theirs, f'stages.{stage}.downsample.{member}.{ours}'


def _cell_names(
    arch: Arch, norm: str, stage: int, their_cell: str, our_cell: str
) -> Iterator[tuple[str, str]]:
    """Yield the authors' names and ours of a cell's parameters."""
    for ours, theirs in _CELL:
        yield their_cell + theirs, our_cell + ours
    ops, stack_names = _STACKS[arch.mixers[stage]]
    if norm == 'bn' and arch.mixers[stage] == 'attn':
        stack_names += _ROW_NORM
    for stack in range(arch.stacks[stage]):
        for ours, (op, rest) in stack_names:
            yield f'{their_cell}ops.{ops * stack + op}.{rest}', f'{our_cell}stacks.{stack}.{ours}'


def split_backbone(weights: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Remove the prefix ``backbone.``.

    Returns:
        The backbone's weights without the prefix, and all others as they are.
    """
    backbone, others = {}, {}
    for key, value in weights.items():
        if key.startswith(BACKBONE):
            backbone[key.removeprefix(BACKBONE)] = value
        else:
            others[key] = value
    return backbone, others


def join_backbone(backbone: Mapping[str, Value], others: Mapping[str, Value]) -> dict[str, Value]:
    """Add the prefix ``backbone.`` to the backbone's names, undoing the split."""
    return {BACKBONE + name: value for name, value in backbone.items()} | dict(others)


def unwrapped(key: str) -> str:
    """Return a key without what DDP and torch.compile insert into it.

    ``module.backbone._orig_mod.x`` becomes ``backbone.x``.
    """
    parts = ('.' + key).replace('._orig_mod.', '.')[1:]
    return parts.removeprefix('module.')


def renamed(weights: Mapping[str, Value], new_name: Callable[[str], str]) -> dict[str, Value]:
    """Return weights under other names.

    Raises:
        ValueError: If two become one, naming them.
    """
    result: dict[str, Value] = {}
    old_names: dict[str, str] = {}
    for key, value in weights.items():
        name = new_name(key)
        if name in result:
            first, second = shown(old_names[name]), shown(key)
            raise ValueError(f'{first} and {second} are both the weight {shown(name)}')
        result[name], old_names[name] = value, key
    return result


def is_backbone(keys: Collection[str]) -> bool:
    """Return whether these keys, without a prefix, are a PolyNeXt's, in either naming."""
    return _AUTHORS_MARK in keys or _OUR_MARK in keys


def is_authors(keys: Collection[str]) -> bool:
    """Return whether these keys, without a prefix, are the authors' names."""
    return _AUTHORS_MARK in keys


def translate(
    state_dict: Mapping[str, Tensor], arch: Arch, expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the authors' weights in our names, shapes and order of channels.

    Names that the arch does not have are kept, so that the strict check reports them.

    Args:
        state_dict: The weights.
        arch: The network's arch.
        expected: Weights of the model, in our names. Weights with another number of elements are
            not reordered, however large they claim to be.

    Raises:
        ValueError: If two names become one.
    """
    names = authors_to_ours(arch, norm_of(state_dict))
    weights = {key: value for key, value in state_dict.items() if key != DROPOUT_RATE}
    ours = renamed(weights, lambda key: names.get(key, key))
    for key, value in weights.items():
        name = names.get(key)
        if name is None:
            continue
        wanted = None if expected is None else expected.get(name)
        fits = expected is None or (wanted is not None and value.numel() == wanted.numel())
        if not fits and not value.is_contiguous():
            continue
        if key.endswith(_PER_QUERY):
            value = _on_map(value, state_dict.get(_sibling(key)))
        value = _our_shape(value, key)
        if fits and (wanted is None or value.shape == wanted.shape):
            value = _reordered(value, name, arch, back=False)
        ours[name] = value
    return ours


def translate_back(state_dict: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Return our weights in the authors' names, shapes and order of channels.

    Raises:
        ValueError: If a name is not one of this arch.
    """
    authors = authors_to_ours(arch, norm_of(state_dict))
    names = {ours: theirs for theirs, ours in authors.items()}
    unknown = [key for key in state_dict if key not in names]
    if unknown:
        raise ValueError(f'not weights of this arch: {", ".join(unknown[:5])}')
    return {
        names[key]: _authors_shape(_reordered(value, key, arch, back=True), names[key])
        for key, value in state_dict.items()
    }


def infer_arch(state_dict: Mapping[str, Tensor]) -> str:
    """Return the name of the arch that weights without a prefix, in either naming, belong to.

    Raises:
        ValueError: If they belong to none of ours.
    """
    stem = state_dict.get('stem.weight')
    keys = {key for key in state_dict if key.startswith(('cells.', 'reductions.', 'stages.'))}
    norm = norm_of(state_dict)
    for name, arch in ARCHS.items():
        names = {
            k: v
            for k, v in authors_to_ours(arch, norm).items()
            if k.startswith(('cells.', 'reductions.'))
        }
        expected = set(names if is_authors(state_dict) else names.values())
        if keys == expected and stem is not None and stem.shape[0] == arch.widths[0]:
            return name
    raise ValueError(f'not the weights of a known arch ({", ".join(ARCHS)})')


def _reordered(value: Tensor, name: str, arch: Arch, back: bool) -> Tensor:
    """Return a weight with its inner channels in our order.

    Args:
        value: The weight, in our shape.
        name: Our name for it.
        arch: The network's arch.
        back: Whether to reorder from ours to the authors' instead.
    """
    stage, _, member = name.removeprefix('stages.').partition('.cells.')
    dim = _INNER_CHANNELS.get(member.partition('.stacks.')[2].partition('.')[2])
    if dim is None or value.ndim <= dim or arch.mixers[int(stage)] != 'conv':
        return value
    order = partner_order(value.shape[dim])
    return value.index_select(dim, (order.argsort() if back else order).to(value.device))


def _sibling(key: str) -> str:
    """Return the name of the sibling norm's table, which has the height and width of the map."""
    return key.rpartition('.norm.')[0] + '.norm2.gamma_hw'


def _on_map(value: Tensor, table: Tensor | None) -> Tensor:
    """Return values per query, (1, heads, H * W, 1), as (heads, H, W)."""
    if table is None or value.ndim != 4 or value.shape[2] != table.numel():
        return value  # the strict check reports it
    return value.reshape(-1, *table.shape[-2:])


def _our_shape(value: Tensor, key: str) -> Tensor:
    if key.endswith('.scale'):
        return value.flatten()
    if key.endswith(_PER_POSITION):
        return value[0, 0] if value.ndim == 4 and value.shape[:2] == (1, 1) else value
    return value.flatten(1) if _is_pointwise(key, value) else value


def _is_pointwise(key: str, value: Tensor) -> bool:
    return value.ndim == 4 and value.shape[2:] == (1, 1) and not key.startswith('reductions.')


def _authors_shape(value: Tensor, key: str) -> Tensor:
    if key.endswith('.scale'):
        return value.reshape(1, -1, 1, 1)
    if key.endswith(_PER_POSITION):
        return value[None, None]
    if key.endswith(_PER_QUERY):
        return value.reshape(1, len(value), -1, 1)
    if value.ndim == 2 and key != 'head.3.weight':
        return value[:, :, None, None]
    return value
