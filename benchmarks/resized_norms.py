"""What resizing the norms' statistics costs a fully polynomial network.

    python benchmarks/resized_norms.py --photos FOLDER --held-out ANOTHER_FOLDER

A network takes the statistics of 16 images at 224x224 and sees other images at another size, where
it resizes them. It is compared with the same weights whose statistics are fresh: of the same 16
images at the size in use. The error of a stage is the norm of the difference of its features over
the norm of those with fresh statistics; of the logits there is the least cosine. Everything is
computed in float64.

The statistics are those of the first 16 photos (*.jpg) of one folder, and the images to compare on
the first 4 of another, cropped to the square in their middle and resized with antialiasing. The
rows "golden input" compare on one image, the noise of the tests' golden numbers for 224x224, with
the statistics of the next 16 of its generator, resized likewise. Weights are random, with a fixed
seed. Every gate is sigmoid(-4): with gates at their initial values, features of random weights are
infinite on images that the statistics were not taken of.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polynext_mm.commands.arguments import positive
from polynext_mm.nn import ARCHS, PolyNeXtClassifier
from polynext_mm.nn.batch_norm import MOMENTUM
from polynext_mm.normalization import IMAGENET
from report import Record, markdown

STATISTICS_OF = 16  # images
HELD_OUT = 4
MEAN, STD = IMAGENET.of_bytes()


def photos(path: Path, count: int) -> list[Tensor]:
    """Return the first photos of a folder, (1, 3, side, side) each, normalized for ImageNet."""
    images = []
    for file in sorted(path.glob('*.jpg'))[:count]:
        with Image.open(file) as opened:
            image = torch.from_numpy(np.array(opened.convert('RGB'))).double()
        side = min(image.shape[:2])
        top, left = ((n - side) // 2 for n in image.shape[:2])
        square = image[top : top + side, left : left + side]
        normalized = (square - torch.tensor(MEAN)) / torch.tensor(STD)
        images.append(normalized.permute(2, 0, 1)[None])
    if len(images) < count:
        raise SystemExit(f'{path} has {len(images)} photos (*.jpg), and {count} are needed')
    return images


def golden_noise(side: int, count: int) -> list[Tensor]:
    """Return the golden input of a size (tests/golden.py) and what its generator gives next."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f'input{side}x{side}'.encode())))
    noise = generator.standard_normal((count, 3, side, side)).astype(np.float32)
    return list(torch.from_numpy(noise).double().split(1))


def at_size(images: list[Tensor], side: int) -> Tensor:
    """Return a batch of images resized to a square."""
    return torch.cat(
        [F.interpolate(image, (side, side), mode='bilinear', antialias=True) for image in images]
    )


@torch.no_grad()
def network(arch: str, images: Tensor) -> PolyNeXtClassifier:
    """Return a network with weak branches and the statistics of a batch."""
    torch.manual_seed(0)
    model = PolyNeXtClassifier(arch, norm='bn', norm_size=tuple(images.shape[2:])).double().train()
    for cell in model.cells():
        cell.gate_logits.fill_(-4)
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]
    model(images)
    for buffer, old in zip(buffers, before):  # one step of the running average, made a whole one
        buffer.copy_(old + (buffer - old) / MOMENTUM)
    return model.eval()


@torch.no_grad()
def compare(model: PolyNeXtClassifier, fresh: PolyNeXtClassifier, images: Tensor) -> Record:
    """Return the relative errors of the features in percent, and the cosine of the logits."""
    found, expected = (list(network.forward_stages(images)) for network in (model, fresh))
    errors = [100 * ((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]
    logits = [
        network.head(features[-1]) for network, features in ((model, found), (fresh, expected))
    ]
    return {
        'error of stages, %': ', '.join(f'{error:.2g}' for error in errors),
        'cosine of logits': F.cosine_similarity(*logits).min().item(),
    }


def measure(arch: str, title: str, seen: list[Tensor], held_out: list[Tensor], args) -> Record:
    """Return the row of a network and a kind of image."""
    model = network(arch, at_size(seen, args.norm_size))
    row = {'network': arch, 'images': title}
    for side in args.sizes:
        found = compare(model, network(arch, at_size(seen, side)), at_size(held_out, side))
        row |= {f'{side}x{side}: {name}': value for name, value in found.items()}
    return row


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What resizing the norms' statistics costs fully polynomial networks"
    )
    parser.add_argument(
        '--archs', nargs='+', choices=ARCHS, default=['cpolynext_t', 'apolynext_t'], metavar='ARCH'
    )
    parser.add_argument(
        '--norm-size', type=positive, default=224, help='of the statistics (default: %(default)s)'
    )
    parser.add_argument(
        '--sizes',
        type=positive,
        nargs='+',
        default=[256, 320],
        help='of the images (default: 256 320)',
    )
    parser.add_argument(
        '--photos',
        type=Path,
        required=True,
        metavar='FOLDER',
        help=f'with {STATISTICS_OF} photos (*.jpg) to take the statistics of',
    )
    parser.add_argument(
        '--held-out',
        type=Path,
        required=True,
        metavar='FOLDER',
        help=f'with {HELD_OUT} photos to compare on',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    noise = golden_noise(args.norm_size, 1 + STATISTICS_OF)
    kinds = {
        'photos': (photos(args.photos, STATISTICS_OF), photos(args.held_out, HELD_OUT)),
        'golden input': (noise[1:], noise[:1]),
    }
    rows = [
        measure(arch, title, *images, args)
        for arch in args.archs
        for title, images in kinds.items()
    ]
    print(markdown(rows))


if __name__ == '__main__':
    main()
