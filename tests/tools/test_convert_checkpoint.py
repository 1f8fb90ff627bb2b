"""tools/convert_checkpoint.py: the authors' names to ours and back, to the last bit."""

import argparse
import os

import numpy as np
import pytest
import torch

from tests.helpers.checkpoints import (
    imagenet_weights,
    is_golden,
    output_norms,
    segmentor_file,
)
from tests.helpers.configs import tiny_config
from tests.helpers.files import ROOT
from tests.helpers.networks import ARCH, build
from tests.helpers.programs import call_tool, python


@pytest.fixture
def convert(capsys):
    """Call the tool; return what it prints, or the message it exits with."""

    def call(*arguments) -> str:
        return call_tool('convert_checkpoint', *arguments) or capsys.readouterr().out

    return call


@pytest.fixture
def paths(tmp_path):
    return tmp_path / 'authors.pt', tmp_path / 'ours.pth', tmp_path / 'back.pt'


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key])
        for key, value in first.items()
    )


@pytest.mark.parametrize('arch', ['cpolynext_t', 'apolynext_t'])
def test_a_backbone_there_and_back(convert, paths, arch):
    authors, ours, back = paths
    torch.save(imagenet_weights(arch), authors)
    total = len(imagenet_weights(arch))
    printed = convert(authors, ours)
    assert printed == (
        f'wrote {ours}: {arch} in our names, {total} tensors of the backbone and 0 of heads\n'
    )
    assert convert(ours, back, '--to', 'authors').startswith(f'wrote {back}: {arch} in the authors')
    assert same(torch.load(back, weights_only=True), imagenet_weights(arch))


def test_a_file_in_our_names_is_the_networks_state_dict(convert, paths):
    authors, ours, _ = paths
    torch.save(imagenet_weights(), authors)
    convert(authors, ours, '--arch', ARCH)
    content = torch.load(ours, weights_only=True)
    backbone = build(arch=ARCH, out_norm=False)
    missing, unexpected = torch.nn.Module.load_state_dict(
        backbone, content['state_dict'], strict=False
    )
    assert not missing
    assert {key.split('.')[0] for key in content['state_dict']} - {'stem', 'stages'} == {'head'}
    assert is_golden(backbone)


@pytest.mark.parametrize('prefix', ['backbone.', 'backbone._orig_mod.'])
def test_a_segmentor_there_and_back(convert, paths, prefix):
    authors, ours, back = paths
    meta = dict(
        dataset_meta=dict(classes=('wall', 'sky'), palette=[[1, 2, 3]], scale=np.float64(2)),
        config='raise SystemExit',
        time='now',
        args=argparse.Namespace(seed=0),
    )
    content = segmentor_file(tiny_config('', ''), prefix, **meta)
    torch.save(dict(content, optimizer=dict(lr=0.1)), authors)
    assert 'of heads' in convert(authors, ours)
    middle = torch.load(ours, weights_only=True)
    assert middle['meta'] == dict(
        dataset_meta=dict(classes=('wall', 'sky'), palette=[[1, 2, 3]]),
        time='now',
        epoch=0,
        iter=160000,
    )
    heads = {k: v for k, v in content['state_dict'].items() if not k.startswith('backbone.')}
    assert same(
        {k: v for k, v in middle['state_dict'].items() if not k.startswith('backbone.')}, heads
    )
    assert torch.equal(
        middle['state_dict']['backbone.out_norms.2.bias'], output_norms()['extra_norms.2.bias']
    )
    convert(ours, back, '--to', 'authors')
    plain = {k.replace('_orig_mod.', ''): v for k, v in content['state_dict'].items()}
    end = torch.load(back, weights_only=True)
    assert same(end['state_dict'], plain)
    assert end['meta'] == middle['meta']


# What is refused, with nothing written


@pytest.mark.parametrize(
    ('content', 'arguments', 'message'),
    [
        (lambda: imagenet_weights(), ['--to', 'authors'], "has the authors' names already"),
        (
            lambda: imagenet_weights(),
            ['--arch', 'cpolynext_s'],
            "the file is of arch 'cpolynext_t'",
        ),
        (
            lambda: {
                k: v for k, v in imagenet_weights().items() if k != 'cells.3.postprocess.weight'
            },
            ['--arch', ARCH],
            '1 missing: stages.1.cells.1.norm.weight',
        ),
        (
            lambda: {
                k: v for k, v in imagenet_weights().items() if k != 'cells.3.postprocess.weight'
            },
            [],
            'give the arch',
        ),
        (lambda: dict(imagenet_weights(), more=torch.ones(2)), [], '1 unexpected: more'),
        (
            lambda: dict(imagenet_weights(), **{'cells.3.skip_weight': torch.ones(8)}),
            [],
            '(8,) instead of (6,)',
        ),
        (lambda: {'conv1.weight': torch.ones(2)}, [], 'not the weights of a known arch'),
        (lambda: {}, [], 'holds no weights'),
        (lambda: dict(imagenet_weights(), more=argparse.ArgumentParser), [], 'execute code'),
    ],
    ids=[
        'names',
        'arch',
        'missing',
        'missing, no arch',
        'unexpected',
        'shape',
        'another network',
        'empty',
        'class',
    ],
)
def test_refusals(convert, paths, content, arguments, message):
    authors, ours, _ = paths
    torch.save(content(), authors)
    printed = convert(authors, ours, *arguments)
    assert message in printed and str(authors) in printed
    assert list(authors.parent.iterdir()) == [authors]


def test_an_absent_file(convert, paths):
    assert 'there is no checkpoint' in convert(*paths[:2])


def test_a_name_that_reading_would_misunderstand(convert, paths):
    torch.save(imagenet_weights(), paths[0])
    assert 'must end in .pt or .pth' in convert(paths[0], paths[0].with_suffix('.safetensors'))


def test_an_existing_file_is_replaced_by_force_alone(convert, paths):
    authors, ours, _ = paths
    torch.save(imagenet_weights(), authors)
    ours.write_text('precious')
    assert 'use --force to replace it' in convert(authors, ours)
    assert ours.read_text() == 'precious'
    assert convert(authors, ours, '--force').startswith('wrote')
    assert 'state_dict' in torch.load(ours, weights_only=True)


@pytest.mark.parametrize('link', [None, os.symlink, os.link])
def test_the_source_is_never_replaced(convert, paths, link):
    authors, ours, _ = paths
    torch.save(imagenet_weights(), authors)
    before = authors.read_bytes()
    if link:
        link(authors, ours)
    target = ours if link else authors
    assert 'is an input and would be overwritten' in convert(authors, target, '--force')
    assert authors.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(convert, paths, monkeypatch):
    authors, ours, _ = paths
    torch.save(imagenet_weights(), authors)
    ours.write_text('precious')

    def full(content, path):
        path.write_bytes(b'half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    assert 'No space left' in convert(authors, ours, '--force')
    assert ours.read_text() == 'precious'
    assert sorted(authors.parent.iterdir()) == [authors, ours]


@pytest.mark.heavy
def test_from_the_command_line(paths):
    authors, ours, _ = paths
    torch.save(imagenet_weights(), authors)
    tool = ROOT / 'tools' / 'convert_checkpoint.py'
    printed = python(tool, authors.name, ours.name, cwd=authors.parent)
    assert printed.startswith(f'wrote {ours.name}: ')
    assert ours.is_file()
