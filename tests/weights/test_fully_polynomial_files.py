"""The released files of fully polynomial and low-resolution networks load strictly."""

import pytest
import torch
from mmengine.runner import load_checkpoint

from polynext_mm import weights
from polynext_mm.weights import CheckpointError
from tests.golden import Golden, image
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.networks import build

FILES = ('cpolynext_t_bn', 'apolynext_t_bn', 'cpolynext_lr')


@pytest.fixture(params=FILES)
def released(request, tmp_path):
    """A file as it is published, and the settings of its backbone."""
    path = tmp_path / f'{request.param}.pt'
    torch.save(imagenet_weights(request.param), path)
    arch = request.param.removesuffix('_bn')
    return request.param, path, dict(arch=arch, norm='ln' if arch == request.param else 'bn')


def assert_golden(backbone, name):
    numbers = Golden(name)
    for size, case in numbers.cases.items():
        with torch.no_grad():
            features = backbone.eval()(image(size, case.get('batch', 1)))
        for stage, feature in enumerate(features):
            index, value, absmean = numbers.values(size, stage)
            assert list(feature.shape) == case['shapes'][stage]
            assert (feature.reshape(-1)[index] - value).abs().max() < 1e-3 * absmean


def by_init_cfg(path, **settings):
    backbone = build(init_cfg=dict(type='Pretrained', checkpoint=str(path)), **settings)
    backbone.init_weights()
    return backbone


def by_mm(path, **settings):
    backbone = build(**settings)
    load_checkpoint(backbone, str(path))
    return backbone


def by_load(path, **settings):
    backbone = build(**settings)
    weights.load(backbone, path)
    return backbone


@pytest.mark.parametrize(
    ('released', 'load'),
    [*((name, by_load) for name in FILES), (FILES[0], by_init_cfg), (FILES[0], by_mm)],
    indirect=['released'],
)
def test_every_way_to_load_computes_what_the_release_computes(released, load):
    name, path, settings = released
    backbone = load(path, out_norm=False, **settings)
    assert backbone.norm_size == ((64, 64) if settings['norm'] == 'bn' else None)
    assert_golden(backbone, name)


def test_output_norms_follow_the_size_that_a_file_tells(released):
    name, path, settings = released
    if settings['norm'] == 'ln':
        pytest.skip('LN has no size')
    backbone = by_load(path, **settings)
    assert backbone.out_norms['3'].running_mean.shape == (2, 2)


def test_converted_and_back_is_the_same_file(released, tmp_path):
    name, path, settings = released
    ours, back = tmp_path / 'ours.pth', tmp_path / 'back.pt'
    assert settings['arch'] in weights.convert(path, ours)
    assert_golden(by_load(ours, out_norm=False, **settings), name)
    weights.convert(ours, back, to='authors')
    expected = imagenet_weights(name)
    written = torch.load(back, weights_only=True)
    assert set(expected) - set(written) <= {'head.2.p'}
    for key, value in written.items():
        assert torch.equal(value, expected[key]) and value.shape == expected[key].shape, key


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop('cells.3.ops.3.2.running_var'), '1 missing: stages.1.cells.1'),
        (lambda w: w.update({'cells.3.ops.3.2.bias': torch.ones(2)}), '1 unexpected'),
        (
            lambda w: w.update({'cells.3.ops.3.2.running_var': torch.ones(1, 1, 9, 8)}),
            r'1 of a wrong shape: .* is \(9, 8\) instead of \(8, 8\)',
        ),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_backbone_as_it_was(tmp_path, change, message):
    path = tmp_path / 'broken.pt'
    content = dict(imagenet_weights('cpolynext_t_bn'))
    change(content)
    torch.save(content, path)
    backbone = build(arch='cpolynext_t', norm='bn', out_norm=False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        weights.load(backbone, path)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
