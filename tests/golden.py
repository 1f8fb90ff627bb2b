"""The recipe of the golden numbers, in this one place.

For seven networks, tests/data holds outputs and gradients that the authors' release computed in
float64, and for two segmentors what its training code did. Weights and inputs come from generators
seeded by names. See tests/data/README.md.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / 'data'
NETWORKS = ('cpolynext_t', 'cpolynext_s', 'apolynext_t', 'apolynext_s', 'cpolynext_lr')
POLYNOMIAL_NETWORKS = ('cpolynext_t_bn', 'apolynext_t_bn')  # of these, outputs alone


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _normal(name: str, shape) -> np.ndarray:
    return generator(name).standard_normal(shape)


def _weight(key: str, shape) -> np.ndarray:
    if key == 'head.2.p' or key.endswith('num_batches_tracked'):
        return np.zeros(shape)
    z = _normal(key, shape)
    if key.endswith('skip_weight'):
        return -1 + 0.5 * z
    if key.endswith('scale') and '.ops.' in key:
        a = 32**-0.5
        return math.log(a / (1 - a)) + 0.1 * z
    if key.endswith('scale'):
        return 1 + 0.1 * z
    if key.endswith('bias'):
        return 0.1 * z
    if key.endswith(('gamma', 'gamma_hw', 'gamma_c')) or len(shape) == 1:
        return 1 + 0.1 * z
    return z / math.sqrt(np.prod(shape[1:]))


def _rounded(array) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def normal(name: str, shape) -> Tensor:
    """Return normally distributed numbers of a name, float32."""
    return _rounded(_normal(name, shape))


class Golden:
    """The golden numbers of one network."""

    def __init__(self, network: str):
        self._json = json.loads((DATA / f'{network}.json').read_text())
        self._arrays = np.load(DATA / f'{network}.npz')
        self.cases = {tuple(case['size']): case for case in self._json['cases']}

    def state_dict(self) -> dict[str, Tensor]:
        """A classifier's checkpoint with the authors' names, float32."""
        prefix = 'buffer.'
        statistics = {
            name.removeprefix(prefix): _rounded(self._arrays[name])
            for name in self._arrays.files
            if name.startswith(prefix)
        }
        return authors_weights(self._json['state_dict_shapes']) | statistics

    def values(self, size, stage: int) -> tuple[Tensor, Tensor, float]:
        """Flat indices into a stage's feature, the values there (float64), the absmean of all."""
        name = '{}x{}.stage{}'.format(*size, stage)
        index, value, mean = (
            self._arrays[f'{name}.{part}'] for part in ('index', 'value', 'absmean')
        )
        return torch.from_numpy(index.astype(np.int64)), torch.from_numpy(value), float(mean)

    def logits(self, size) -> Tensor:
        return torch.from_numpy(self._arrays['{}x{}.logits'.format(*size)])


class Recipe:
    """What the authors' training code did with one UperNet on ADE20K.

    Attributes:
        loss_weight: Factor on the weights of both losses.
        rates: By iteration, the learning rates of the groups.
        losses: Of five steps from iteration 2000, by the names of mmseg 0.x.
        groups: By the authors' name, factors on weight decay and on the learning rate.
        moved: By the authors' name, the L2 norm of the tensor's change in the five steps.
        pixels, classes, confidences: Of the prediction for one image, at flat positions.
    """

    def __init__(self, network: str):
        content = json.loads((DATA / f'recipe_{network}.json').read_text())
        arrays = np.load(DATA / f'recipe_{network}.npz')
        self.loss_weight, self.losses = content['loss_weight'], content['losses']
        self.rates = {int(iteration): rates for iteration, rates in content['rates'].items()}
        tensors = content['tensors']
        self._shapes = {key: shape for key, (shape, _, _) in tensors.items()}
        self.groups = {key: group for key, (_, group, _) in tensors.items() if group}
        self.moved = {key: moved for key, (_, _, moved) in tensors.items() if moved is not None}
        self.pixels = torch.from_numpy(arrays['pixels'].astype(np.int64))
        self.classes = torch.from_numpy(arrays['classes'].astype(np.int64))
        self.confidences = torch.from_numpy(arrays['confidences'])

    def state_dict(self) -> dict[str, Tensor]:
        """A segmentor's checkpoint with the authors' names, float32."""
        weights = authors_weights(self._shapes)
        for key, value in weights.items():
            if key.endswith(('running_mean', 'running_var')):
                value.fill_(key.endswith('running_var'))
        return weights


def authors_weights(shapes) -> dict[str, Tensor]:
    """Weights of the recipe for authors' names and their shapes."""
    return {key: _rounded(_weight(key, tuple(shape))) for key, shape in shapes.items()}


def image(size, batch: int = 1) -> Tensor:
    """The input of a case, (batch, 3, H, W), float32."""
    return normal('input{}x{}'.format(*size), (batch, 3, *size))


def loss(features, size) -> Tensor:
    """The scalar whose gradients the golden files hold."""
    return sum(
        (f * normal('cotangent{}x{}stage{}'.format(*size, i), f.shape).to(f.dtype)).mean()
        for i, f in enumerate(features)
    )
