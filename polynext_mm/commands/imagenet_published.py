"""Published accuracy on ImageNet-1K and on the robustness benchmarks.

Everything is in percent: mCE on ImageNet-C, where lower is better, and top-1 elsewhere.
"""

from ..weights import PUBLISHED

# Top-1 at 224x224 of timm's peers, as published by the authors of "MetaFormer Baselines for Vision"
# (arXiv 2210.13452).
_PEERS = {
    'convformer_s18.sail_in1k': 83.0,
    'convformer_s36.sail_in1k': 84.1,
    'convformer_m36.sail_in1k': 84.5,
    'caformer_s18.sail_in1k': 83.6,
    'caformer_s36.sail_in1k': 84.5,
    'caformer_m36.sail_in1k': 85.2,
}

# The robustness table of PolyNeXt's paper, peers included, as the authors' release repeats it
# (github.com/jjwang8/PolyNeXt, docs/index.html; without the peers, robustness/README.md).
_BENCHMARKS = ('imagenet-c', 'imagenet-a', 'imagenet-r', 'imagenet-sketch')
_ROBUSTNESS = {
    'cpolynext_s': (47.9, 35.1, 49.4, 37.8),
    'apolynext_s': (45.0, 39.6, 49.7, 37.5),
    'cpolynext_b': (44.5, 42.8, 52.0, 40.0),
    'apolynext_b': (42.7, 46.8, 52.8, 41.1),
    'cpolynext_l': (42.5, 48.3, 54.5, 41.8),
    'apolynext_l': (42.9, 49.2, 54.0, 41.8),
    'convformer_s18.sail_in1k': (51.7, 25.3, 48.7, 35.2),
    'convformer_s36.sail_in1k': (47.1, 33.2, 50.8, 38.4),
    'convformer_m36.sail_in1k': (46.5, 37.6, 51.0, 39.2),
    'caformer_s18.sail_in1k': (47.4, 33.5, 48.7, 36.6),
    'caformer_s36.sail_in1k': (44.7, 40.9, 51.7, 39.5),
    'caformer_m36.sail_in1k': (42.6, 45.6, 51.7, 39.6),
}


def published_figures(name: str) -> dict[str, float]:
    """Return the published figures of a network, by the option of the benchmark.

    Args:
        name: An arch, followed by ``_bn`` if it is fully polynomial, or timm's name for a peer.

    Returns:
        In percent. Benchmarks without a published figure are left out.
    """
    top1 = _PEERS.get(name)
    if name in PUBLISHED and PUBLISHED[name].holds == 'imagenet':
        top1 = PUBLISHED[name].figure
    figures = {} if top1 is None else {'imagenet': top1}
    return figures | dict(zip(_BENCHMARKS, _ROBUSTNESS.get(name, ())))
