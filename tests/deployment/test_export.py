"""``polynext-mm export``: graphs for any size that other programs run, and errors for people."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from polynext_mm.commands.export import main
from polynext_mm.compat.torch_features import EXPORT
from polynext_mm.deployment import (
    FORMATS,
    ExportError,
    capture,
    check,
    fused,
    make_network,
    programs,
)
from polynext_mm.inference.predictor import build_model as build_trained
from tests.deployment import small
from tests.helpers import zipped
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.files import CONFIG, ROOT
from tests.helpers.networks import ARCH, build
from tests.helpers.tiny import TINY_ARCH, TWO_STAGES
from tests.marks import needs, some_slow

pytestmark = [pytest.mark.heavy, needs(EXPORT)]

SHAPES = [(1, 32, 32), (2, 33, 70), (3, 96, 64)]


def export(*arguments) -> str | None:
    """Run the command; return the message that it exits with, if it does."""
    try:
        assert main([str(argument) for argument in arguments]) == 0
    except SystemExit as end:
        return str(end)


def two_stages(**options) -> Config:
    heads = {
        'decode_head.in_index': [0, 1],
        'auxiliary_head.in_index': 1,
        'auxiliary_head.in_channels': 16,
    }
    cfg = small.config(
        small.SEGMENTOR, TINY_ARCH, **{'backbone.out_indices': (0, 1)}, **heads, **options
    )
    cfg.model.backbone.arch = TWO_STAGES
    cfg.model.decode_head.in_channels = list(TWO_STAGES['widths'])
    return cfg


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return small.files(two_stages(), tmp_path_factory.mktemp('segmentor'))


@pytest.fixture(scope='module')
def exported(segmentor, tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'model.onnx'
    assert export(*segmentor, '--out', path, '--preprocess') is None
    return path


def load(segmentor):
    cfg = Config.fromfile(segmentor[0])
    return build_trained(cfg, str(segmentor[1]), 'cpu')


def test_onnx_of_a_segmentor(segmentor, exported):
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(exported)
    (taken,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type) == ('images', 'tensor(uint8)')
    assert taken.shape == ['batch', 3, 'height', 'width']
    assert (returned.name, returned.shape) == ('logits', ['batch', 5, 'height', 'width'])
    classes = session.get_modelmeta().custom_metadata_map['classes']
    assert json.loads(classes) == ['sky', 'road', 'tree', 'car', 'sign']
    assert onnx.load(exported).opset_import[0].version >= 20

    model = load(segmentor)
    for batch, height, width in SHAPES:
        images = np.random.default_rng(height).integers(0, 256, (batch, 3, height, width), np.uint8)
        (logits,) = session.run(None, {'images': images})
        with torch.no_grad():
            results = model.test_step(dict(inputs=list(torch.from_numpy(images))))
        expected = torch.stack([result.seg_logits.data for result in results]).numpy()
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_file_is_not_lost(segmentor, exported, tmp_path, monkeypatch):
    out = tmp_path / 'model.onnx'
    out.write_text('precious')
    message = export(*segmentor, '--out', out)
    assert message == f'FileExistsError: {out} exists: use --force to replace it'

    def wrong(program, network, path, metadata):
        path.write_bytes(exported.read_bytes())

    # a graph that takes other images than the network
    monkeypatch.setitem(FORMATS, 'onnx', FORMATS['onnx']._replace(write=wrong))
    monkeypatch.setattr('polynext_mm.deployment.capture', lambda network, with_hints: None)
    assert f'{out} fails on images of 1x32x32' in export(*segmentor, '--out', out, '--force')
    assert out.read_text() == 'precious'
    assert list(tmp_path.iterdir()) == [out]

    assert export(*segmentor, '--out', out, '--force', '--preprocess') is None
    assert out.read_bytes() == exported.read_bytes()


def test_without_onnxruntime_it_says_so(segmentor, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'new' / 'model.onnx'
    form = FORMATS['onnx']._replace(
        consumer='no_such_package', write=lambda program, network, path, metadata: path.touch()
    )
    monkeypatch.setitem(FORMATS, 'onnx', form)
    monkeypatch.setattr('polynext_mm.deployment.capture', lambda network, with_hints: None)
    assert export(*segmentor, '--out', out) is None
    printed = capsys.readouterr().out
    assert 'not checked: no_such_package is not installed (pip install onnxruntime)' in printed
    assert out.exists()


@pytest.mark.parametrize('name', some_slow([small.RETINANET, small.ATSS], [small.RETINANET]))
def test_one_graph_of_a_detector_for_every_size(name):
    network = make_network(small.model(small.config(name)), preprocess=True)
    graph = capture(fused(network)).module()
    assert max(check(network, lambda images: list(graph(images)), SHAPES, name)) < 1e-5


@pytest.mark.slow
def test_features_from_a_file_of_the_backbone_alone(tmp_path, capsys):
    torch.save(imagenet_weights(), tmp_path / 'imagenet.pth')
    out = tmp_path / 'features.pt2'
    arguments = (CONFIG, tmp_path / 'imagenet.pth', '--out', out, '--output', 'features')
    options = ('--cfg-options', 'model.backbone.out_norm=False', '--check-sizes', '64x80')
    assert export(*arguments, *options) is None
    assert 'PolyNeXt: loaded ' in capsys.readouterr().out
    images = torch.randn(2, 3, 40, 64)
    features = torch.export.load(out).module()(images)
    model = build(arch=ARCH, out_norm=False)
    model.load_state_dict(imagenet_weights(), strict=False)
    with torch.no_grad():
        for feature, expected in zipped(features, model.eval()(images)):
            assert (feature - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_check_finds_what_differs(segmentor):
    network = make_network(load(segmentor))
    with pytest.raises(
        ExportError, match='wrong.onnx differs from torch by .* on images of 2x40x4'
    ):
        check(network, lambda images: [1.01 * network(images)[0]], [(2, 40, 48)], 'wrong.onnx')
    labels = make_network(load(segmentor), 'labels')
    right = lambda images: list(labels(images))  # noqa: E731
    assert check(labels, right, [(1, 32, 32)], 'right') == [0]
    with pytest.raises(ExportError, match='wrong differs from torch'):
        check(labels, lambda images: [(labels(images)[0] + 1) % 5], [(1, 32, 32)], 'wrong')
    features = make_network(load(segmentor), 'features')

    def last_is_nan(images):
        *outputs, last = features(images)
        return [*outputs, last * float('nan')]

    with pytest.raises(ExportError, match='differs from torch by nan'):
        check(features, last_is_nan, [(1, 64, 64)], 'nan')


def test_what_depends_on_a_size_is_an_error():
    class Odd(nn.Module):
        in_channels, preprocessing = 3, None

        def forward(self, images):
            return images * 2 if images.shape[-1] % 7 else images

    with pytest.raises(ExportError, match='no graph for every size can be captured of this model'):
        capture(Odd())


def test_align_corners_of_mmseg_is_refused():
    network = make_network(small.model(two_stages(**{'decode_head.align_corners': True})))
    with pytest.raises(ExportError, match='no graph for every size can be captured of this model'):
        capture(fused(network))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--out', 'model.pb'], 'UsageError: --out must end in .onnx or .pt2, got model.pb'),
        (['--out', 'm.onnx', '--aot'], 'UsageError: --out must end in .pt2 with --aot, got m.onnx'),
        (
            ['--out', 'm.onnx', '--output', 'boxes'],
            'UnsupportedModelError: boxes of EncoderDecoder',
        ),
    ],
)
def test_errors_for_people(segmentor, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(*segmentor, *arguments).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_config_or_checkpoint_that_is_missing_or_does_not_fit(segmentor, tmp_path):
    out = tmp_path / 'model.onnx'
    assert 'there is no config nowhere' in export('nowhere', segmentor[1], '--out', out)
    absent = tmp_path / 'no.pth'
    assert f'there is no checkpoint {absent}' in export(segmentor[0], absent, '--out', out)
    weights = torch.load(segmentor[1])
    weights['state_dict'].pop('decode_head.conv_seg.bias')
    torch.save(weights, tmp_path / 'cut.pth')
    message = export(segmentor[0], tmp_path / 'cut.pth', '--out', out)
    assert message.startswith('CheckpointError') and 'decode_head.conv_seg.bias' in message
    assert not out.exists()


def test_missing_packages_and_compilers_are_named(segmentor, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, 'find_spec', lambda name: None)
    message = export(*segmentor, '--out', tmp_path / 'model.onnx')
    assert message == (
        'ExportError: onnx and onnxscript must be installed: pip install onnx onnxscript'
    )
    monkeypatch.setattr('shutil.which', lambda name: None)
    message = export(*segmentor, '--out', tmp_path / 'model.pt2', '--aot')
    assert message.startswith('ExportError: AOTInductor needs a C++ compiler and there is no g++')


@pytest.mark.parametrize('size', ['31x64', '64', 'axb'])
def test_sizes_to_check_are_checked(segmentor, size, capsys):
    assert export(*segmentor, '--out', 'model.onnx', '--check-sizes', size) == '2'
    assert '--check-sizes' in capsys.readouterr().err


# Slow: the real networks, large images, and other consumers

LARGE = [(1, 32, 32), (2, 33, 65), (1, 257, 131), (1, 512, 384), (1, 1024, 1024)]


@pytest.fixture(
    scope='module',
    params=[
        (small.SEGMENTOR, 'cpolynext_t', 'logits'),
        (small.SEGMENTOR, 'apolynext_t', 'labels'),
        (small.RETINANET, 'apolynext_t', 'boxes'),
        (small.ATSS, 'cpolynext_t', 'boxes'),
    ],
    ids=lambda param: '-'.join(param),
)
def real(request, tmp_path_factory):
    """Return a network of a published arch and the ONNX file of it."""
    name, arch, output = request.param
    network = make_network(small.model(small.config(name, arch)), output)
    path = tmp_path_factory.mktemp('real') / 'model.onnx'
    FORMATS['onnx'].write(capture(fused(network)), network, path, {})
    return network, path


@pytest.mark.slow
def test_onnxruntime_agrees_up_to_1024(real):
    network, path = real
    check(network, FORMATS['onnx'].open(path), LARGE, 'onnxruntime')


@pytest.mark.slow
def test_openvino_agrees(real):
    import openvino

    network, path = real
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})

    def run(images):
        return [torch.from_numpy(found) for found in compiled(images.numpy()).to_tuple()]

    check(network, run, LARGE[:4], 'OpenVINO')


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['cpolynext_t', 'apolynext_t'])
def test_a_program_of_torch_agrees(arch, tmp_path):
    paths = small.files(small.config(small.SEGMENTOR, arch), tmp_path)
    sizes = [f'{height}x{width}' for _, height, width in LARGE[:4]]
    out = tmp_path / 'model.pt2'
    assert export(*paths, '--out', out, '--check-sizes', *sizes) is None


@pytest.mark.slow
@pytest.mark.parametrize('make', [two_stages, lambda: small.config(small.ATSS)], ids=['seg', 'det'])
def test_a_compiled_program_agrees(make, tmp_path):
    paths = small.files(make(), tmp_path)
    sizes = [f'{height}x{width}' for _, height, width in LARGE[:4]]
    out = tmp_path / 'model.pt2'
    assert export(*paths, '--out', out, '--aot', '--preprocess', '--check-sizes', *sizes) is None
    metadata = torch._inductor.aoti_load_package(str(out)).get_metadata()
    assert json.loads(metadata['classes']) == list(
        torch.load(paths[1])['meta']['dataset_meta']['classes']
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'make', 'options'),
    [
        ('segmentor.onnx', two_stages, ('--output', 'labels')),
        ('detector.onnx', lambda: small.config(small.ATSS), ()),
    ],
    ids=['segmentor', 'detector'],
)
def test_the_programs_of_the_page(name, make, options, tmp_path, monkeypatch, capsys):
    import cv2

    monkeypatch.chdir(tmp_path)
    paths = small.files(make(), tmp_path)
    assert export(*paths, '--out', name, '--preprocess', *options) is None
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    cv2.imwrite('image.png', image)
    page = (ROOT / 'docs' / 'deployment.md').read_text()
    (program,) = [
        block for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL) if name in block
    ]
    capsys.readouterr()
    exec(program, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    if name == 'segmentor.onnx':
        shares = dict(line.split(': ') for line in lines)
        assert set(shares) <= {'sky', 'road', 'tree', 'car', 'sign'}
        assert sum(float(share.rstrip('%')) for share in shares.values()) == pytest.approx(
            100, abs=1
        )
