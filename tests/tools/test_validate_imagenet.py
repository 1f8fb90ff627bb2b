"""Accuracy on ImageNet and on the benchmarks of robustness: layouts, classes, numbers, files.

The networks here classify by colour: an image is of one colour, which says what is predicted, and
its folder says what is right.
"""

import dataclasses
import json
import re

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision import transforms

from polynext_mm.commands.imagenet_benchmarks import ALEXNET_ERRORS, BENCHMARKS, find_images
from polynext_mm.commands.imagenet_published import published_figures
from polynext_mm.commands.imagenet_scores import (
    Conditions,
    Result,
    Score,
    Subject,
    as_json,
    load_subject,
    score,
    table,
)
from polynext_mm.commands.validate_imagenet import main
from polynext_mm.nn import PolyNeXtClassifier
from polynext_mm.weights import CheckpointError, load
from tests.golden import Golden
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.files import ROOT
from tests.helpers.programs import call_tool

WNIDS = ImageNetInfo().label_names()
BY_OPTION = {benchmark.option: benchmark for benchmark in BENCHMARKS}
SUBSETS = ('imagenet-a', 'imagenet-r')


class ByColour(nn.Module):
    """The class of a colour is the best, and the four after it are the next."""

    def __init__(self, num_classes: int = 1000, **_):
        super().__init__()
        self.num_classes = num_classes
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        red, green, _ = (x.mean((2, 3)) * 255).round().long().unbind(1)
        first = (red // 4) * 32 + green // 4
        places = torch.arange(self.num_classes) - first[:, None]
        return -(places % self.num_classes).float()


# small, not normalized
_SETTINGS = dict(
    input_size=(3, 8, 8),
    num_classes=1000,
    crop_pct=1.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    first_conv='unused',
    classifier='unused',
)
default_cfgs = generate_default_cfgs({'classifier_by_colour.test': _SETTINGS})


@register_model
def classifier_by_colour(pretrained: bool = False, **options) -> nn.Module:
    return build_model_with_cfg(ByColour, 'classifier_by_colour', False, **options)


BY_COLOUR = 'timm://classifier_by_colour'


def put(folder, wnid: str, predicted: int, name: str = '0.png') -> None:
    """Write an image of a class that is taken for another."""
    (folder / wnid).mkdir(parents=True, exist_ok=True)
    colour = (predicted // 32 * 4 + 1, predicted % 32 * 4 + 1, 0)
    Image.new('RGB', (9, 7), colour).save(folder / wnid / name)


def measured(tmp_path, *arguments) -> dict:
    """Run the tool in this process and return what it writes."""
    report = tmp_path / 'report.json'
    command = [BY_COLOUR, '--workers', '0', '--batch-size', '96', '--json', str(report)]
    assert main([*command, *map(str, arguments)]) == 0
    return json.loads(report.read_text())


def failure(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([BY_COLOUR, '--workers', '0', *map(str, arguments)])
    return str(stopped.value)


# Classes


def test_lists_of_classes():
    assert len(WNIDS) == 1000
    for option, benchmark in BY_OPTION.items():
        if option in SUBSETS:
            assert len(benchmark.wnids) == 200
            assert [WNIDS[index] for index in benchmark.indices] == benchmark.wnids
        else:
            assert benchmark.wnids == WNIDS and benchmark.indices is None
    assert set(BY_OPTION['imagenet-a'].wnids) != set(BY_OPTION['imagenet-r'].wnids)


# Numbers


@pytest.mark.parametrize('option', ['imagenet', 'imagenet-sketch'])
@pytest.mark.parametrize('inner', ['', 'val'])
def test_all_classes(option, inner, tmp_path, capsys):
    """One image of each class: 400 right, 300 in the second place, 100 in the fifth, 200 wrong."""
    if option == 'imagenet-sketch' and inner:
        pytest.skip('only ImageNet-1K is unpacked so')
    folder = tmp_path / 'images'
    shifts = [0] * 400 + [1] * 300 + [4] * 100 + [5] * 200
    for index, (wnid, shift) in enumerate(zip(WNIDS, shifts)):
        put(folder / inner, wnid, (index - shift) % 1000)
    report = measured(tmp_path, f'--{option}', folder)
    assert report['results'] == {
        option: dict(
            images=1000,
            complete_images=BY_OPTION[option].images,
            top1=pytest.approx(40.0),
            top5=pytest.approx(80.0),
        )
    }
    printed = capsys.readouterr()
    (row,) = [line for line in printed.out.splitlines() if line.startswith(BY_OPTION[option].name)]
    assert row.split()[-4:] == ['1000', '-', '40.00', '80.00']
    assert f'has {BY_OPTION[option].images} images, and 1000 were measured' in printed.out
    assert '1000/1000' in printed.err  # the bar


@pytest.mark.parametrize('option', SUBSETS)
def test_200_classes_are_compared_among_themselves(option, tmp_path):
    """The best of the 200 counts, not the best of the 1000."""
    benchmark, folder = BY_OPTION[option], tmp_path / 'images'
    others = sorted(set(range(1000)) - set(benchmark.indices))
    expected = dict(top1=0, top5=0)
    for place, (wnid, index) in enumerate(zip(benchmark.wnids, benchmark.indices)):
        # the class itself, the one after it among the 200, or one that is not among the 200
        neighbour = benchmark.indices[(place + 1) % 200]
        predicted = (index, neighbour, others[place])[place % 3]
        put(folder, wnid, predicted)
        ranked = sorted(benchmark.indices, key=lambda i: (i - predicted) % 1000)
        expected['top1'] += ranked[0] == index
        expected['top5'] += index in ranked[:5]
    result = measured(tmp_path, f'--{option}', folder)['results'][option]
    assert result['images'] == 200
    for name, hits in expected.items():
        assert 67 <= hits < 200 and result[name] == pytest.approx(hits / 2), name


@pytest.fixture(scope='module')
def corrupted(tmp_path_factory):
    """ImageNet-C with two classes: an image is right up to a severity that the corruption says."""
    folder = tmp_path_factory.mktemp('imagenet-c')
    for number, corruption in enumerate(ALEXNET_ERRORS):
        for severity in range(1, 6):
            right = severity <= number % 6
            for index in (0, 7):
                put(
                    folder / corruption / str(severity),
                    WNIDS[index],
                    index if right else index + 50,
                )
    return folder


def test_corruption_errors_are_relative_to_alexnets(corrupted, tmp_path, capsys):
    report = measured(tmp_path, '--imagenet-c', corrupted, '--partial')
    result = report['results']['imagenet-c']
    errors = {name: 1 - number % 6 / 5 for number, name in enumerate(ALEXNET_ERRORS)}
    assert result['images'] == 150 and result['complete_images'] == 75 * 50000
    assert result['errors'] == pytest.approx({name: 100 * e for name, e in errors.items()})
    relative = {name: 100 * error / ALEXNET_ERRORS[name] for name, error in errors.items()}
    assert result['corruption_errors'] == pytest.approx(relative)
    assert result['mce'] == pytest.approx(sum(relative.values()) / 15)
    assert result['top1'] == pytest.approx(100 - 100 * sum(errors.values()) / 15)
    printed = capsys.readouterr().out
    assert re.search(rf'ImageNet-C .* {result["mce"]:.2f}\n', printed)
    assert re.search(r'gaussian_noise +100.00 +112.81\n', printed)


def test_alexnet_has_an_mce_of_100():
    assert len(ALEXNET_ERRORS) == 15
    assert Result(BY_OPTION['imagenet-c'], Score(), ALEXNET_ERRORS).mce == pytest.approx(100)


@pytest.mark.heavy
def test_several_benchmarks_and_worker_processes(tmp_path):
    for folder, wnids in (('a', BY_OPTION['imagenet-a'].wnids), ('1k', WNIDS)):
        for wnid in wnids[:3]:
            put(tmp_path / folder, wnid, WNIDS.index(wnid))
    arguments = ['--partial', '--imagenet', tmp_path / '1k', '--imagenet-a', tmp_path / 'a']
    report = measured(tmp_path, *arguments, '--workers', '1', '--dtype', 'bfloat16')
    assert report['dtype'] == 'bfloat16'
    for option in ('imagenet', 'imagenet-a'):
        assert report['results'][option]['top1'] == 100 and report['results'][option]['images'] == 3


# Layouts


def test_nothing_to_measure_on(capsys):
    with pytest.raises(SystemExit):
        main([BY_COLOUR])
    assert 'at least one of --imagenet, --imagenet-a' in capsys.readouterr().err


@pytest.mark.parametrize('benchmark', BENCHMARKS, ids=lambda benchmark: benchmark.option)
def test_an_absent_folder(benchmark, tmp_path):
    message = failure(f'--{benchmark.option}', tmp_path / 'absent')
    assert message.startswith(
        f'LayoutError: {tmp_path}/absent is not {benchmark.name}: there is no'
    )
    assert f'expected: {tmp_path}/absent/{benchmark.layout}' in message


def test_images_that_are_not_in_folders_of_classes(tmp_path):
    put(tmp_path, '', 0, 'ILSVRC2012_val_00000001.png')
    message = failure('--imagenet', tmp_path)
    assert 'none of its 1000 class folders is in' in message
    assert 'n01440764/*.JPEG, and so on for 1000 classes' in message


def test_missing_classes(tmp_path):
    for wnid in WNIDS[:-2]:
        (tmp_path / wnid).mkdir()
    message = failure('--imagenet-sketch', tmp_path)
    assert f'2 of its 1000 class folders are not in {tmp_path}, such as {WNIDS[-2]}' in message
    assert '--partial' in message
    message = failure('--imagenet-sketch', tmp_path, '--partial')
    assert message.startswith('LayoutError: ') and '0 images' in message


def test_another_benchmark_in_the_place_of_one(tmp_path):
    for wnid in BY_OPTION['imagenet-r'].wnids:
        (tmp_path / wnid).mkdir()
    message = failure('--imagenet-a', tmp_path, '--partial')
    assert 'is not ImageNet-A' in message and 'other folders, such as n' in message


def test_a_missing_corruption_and_severity(corrupted):
    benchmark = BY_OPTION['imagenet-c']
    found = find_images(benchmark, corrupted, partial=True)
    assert len(found) == 75 and found[5] == corrupted / 'shot_noise' / '1'
    for absent in ('fog', 'snow/3'):
        (corrupted / absent).rename(corrupted / 'moved')
        message = failure('--imagenet-c', corrupted, '--partial')
        (corrupted / 'moved').rename(corrupted / absent)
        assert f'there is no folder {corrupted}/{absent}' in message
        assert 'gaussian_noise/1/n01440764/*.JPEG' in message
        assert '15 corruptions, each in severities 1 to 5' in message


@pytest.mark.heavy
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_is_named(workers, tmp_path):
    for wnid in WNIDS[:3]:
        put(tmp_path, wnid, 0)
    damaged = tmp_path / WNIDS[1] / '0.png'
    damaged.write_bytes(damaged.read_bytes()[:40])
    message = failure('--imagenet', tmp_path, '--partial', '--workers', workers)
    assert message == f'ImageError: {damaged} cannot be read as an image'


# Classifiers


@pytest.mark.parametrize('network', ['cpolynext_t', 'apolynext_t_bn'])
def test_a_published_file(network, tmp_path):
    """It computes what the release computes, and images are prepared as for the release."""
    path = tmp_path / 'some_name.pt'
    torch.save(
        dict(state_dict={f'module.{k}': v for k, v in imagenet_weights(network).items()}), path
    )
    subject = load_subject(str(path))
    figures = dict(cpolynext_t=80.2, apolynext_t_bn=78.0)
    assert (subject.name, subject.published) == (network, {'imagenet': figures[network]})
    assert not subject.model.training
    assert subject.transform == dict(
        input_size=(3, 224, 224),
        interpolation='bicubic',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=0.965,
        crop_mode='center',
    )
    size = next(iter(Golden(network).cases))
    assert subject.model(torch.randn(1, 3, *size)).shape == (1, 1000)


class Recorder(nn.Module):
    """Keeps the last images."""

    def forward(self, x: Tensor) -> Tensor:
        self.images = x
        return torch.zeros(len(x), 1000)


CPU = Conditions(torch.device('cpu'), torch.float32, batch_size=8, workers=0)


@pytest.mark.parametrize('option', BY_OPTION)
def test_images_are_prepared_as_by_the_release(option, tmp_path):
    """Shorter side 232 and a crop of 224, bicubic; bilinear on -R, no crop on -C."""
    path, benchmark = tmp_path / 'file.pt', BY_OPTION[option]
    torch.save(imagenet_weights(), path)
    subject = dataclasses.replace(load_subject(str(path)), model=Recorder())
    size = (256, 256) if option == 'imagenet-c' else (300, 260)
    pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
    image = transforms.functional.to_pil_image(pixels)
    folder = tmp_path / 'images' / benchmark.wnids[0]
    folder.mkdir(parents=True)
    image.save(folder / '0.png')
    score(subject, benchmark, tmp_path / 'images', CPU, '')
    modes = transforms.InterpolationMode
    expected = transforms.Compose(
        [
            transforms.Resize(
                224 if option == 'imagenet-c' else 232,
                modes.BILINEAR if option == 'imagenet-r' else modes.BICUBIC,
            ),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(image)
    torch.testing.assert_close(subject.model.images[0], expected)
    result = as_json(subject, [Result(benchmark, Score(1))], CPU)
    own = result['results'][option].get('transform', {})
    assert set(own.items()) - set(result['transform'].items()) == {
        'imagenet-r': {('interpolation', 'bilinear')},
        'imagenet-c': {('crop_pct', 1.0)},
    }.get(option, set())


# Published figures


def test_published_figures_stand_beside_what_is_measured():
    """mCE beside mCE, top-1 beside top-1."""
    published = published_figures('cpolynext_s')
    subject = Subject('cpolynext_s', Recorder(), {}, published)
    results = [
        Result(benchmark, Score(1000, 400, 800), ALEXNET_ERRORS if option == 'imagenet-c' else None)
        for option, benchmark in BY_OPTION.items()
    ]
    header, *lines = table(subject, results).splitlines()
    assert header.split() == 'percent images published top-1 top-5 published mCE'.split()
    assert [line.split() for line in lines[: len(BY_OPTION)]] == [
        ['ImageNet-1K', '1000', '83.9', '40.00', '80.00'],
        ['ImageNet-A', '1000', '35.1', '40.00', '80.00'],
        ['ImageNet-R', '1000', '49.4', '40.00', '80.00'],
        ['ImageNet-Sketch', '1000', '37.8', '40.00', '80.00'],
        ['ImageNet-C', '1000', '-', '40.00', '80.00', '47.9', '100.00'],
    ]
    assert as_json(subject, results, CPU)['published'] == published


def test_peers_have_published_figures_too():
    assert published_figures('caformer_m36.sail_in1k') == {
        'imagenet': 85.2,
        'imagenet-a': 45.6,
        'imagenet-r': 51.7,
        'imagenet-sketch': 39.6,
        'imagenet-c': 42.6,
    }
    for name in ('resnet50.a1_in1k', 'uper_cpolynexts', 'cpolynext_lr_cifar10'):
        assert published_figures(name) == {}


def test_the_documentation_has_the_figures_of_the_tool():
    text = (ROOT / 'docs' / 'imagenet.md').read_text()
    columns = ('imagenet', 'imagenet-c', 'imagenet-a', 'imagenet-r', 'imagenet-sketch')
    shown = {}
    for name, *figures in re.findall(r'^\| (\S+)' + r' \| ([\d.]+)' * 5 + r' \|$', text, re.M):
        arch = name.lower().replace('-', '_')
        arch += '' if 'polynext' in arch else '.sail_in1k'
        shown[arch] = dict(zip(columns, map(float, figures)))
    assert len(shown) == 12
    assert shown == {name: published_figures(name) for name in shown}


def test_a_file_without_a_published_figure(tmp_path):
    path = tmp_path / 'mine.pt'
    torch.save(PolyNeXtClassifier('cpolynext_b', norm='bn').state_dict(), path)
    subject = load_subject(str(path))
    assert (subject.name, subject.published) == ('cpolynext_b_bn', {})
    torch.save(PolyNeXtClassifier('cpolynext_lr', num_classes=1000).state_dict(), path)
    with pytest.raises(CheckpointError, match="'cpolynext_lr', which is not one for ImageNet"):
        load_subject(str(path))


def test_a_published_file_through_the_tool(tmp_path, capsys):
    path, report = tmp_path / 'file.pt', tmp_path / 'new' / 'report.json'
    torch.save(imagenet_weights(), path)
    images = tmp_path / 'images'
    for index, name in ((0, 'a.png'), (1, 'b.png')):
        put(images, WNIDS[index], index, name)
    options = ('--partial', '--workers', 0, '--json', report)
    assert call_tool('validate_imagenet', path, '--imagenet', images, *options) is None
    printed, told = capsys.readouterr()
    assert re.search(r'ImageNet-1K +2 +80\.2 +\d+\.00 +\d+\.00\n', printed)
    assert 'loaded ' in told  # how many tensors
    model = PolyNeXtClassifier('cpolynext_t').eval()
    load(model, path)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg('cpolynext_t').to_dict()
        )
    )
    inputs = [transform(Image.open(images / WNIDS[i] / n)) for i, n in ((0, 'a.png'), (1, 'b.png'))]
    with torch.no_grad():
        right = model(torch.stack(inputs)).argmax(1) == torch.arange(2)
    written = json.loads(report.read_text())
    assert written['results']['imagenet']['top1'] == 100 * right.float().mean().item()
    assert (written['model'], written['published']) == ('cpolynext_t', {'imagenet': 80.2})


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (lambda: imagenet_weights('cpolynext_lr'), 'tells 10 classes apart'),
        (
            lambda: {k: v for k, v in imagenet_weights().items() if not k.startswith('head')},
            'holds no classifier',
        ),
        (
            lambda: {k: v for k, v in imagenet_weights().items() if not k.startswith('cells.3.')},
            'not the weights of a known arch',
        ),
        (
            lambda: {k: v for k, v in imagenet_weights().items() if k != 'proj.weight'},
            '1 missing: head.proj.weight',
        ),
    ],
)
def test_files_that_are_no_classifier_of_imagenet(content, problem, tmp_path):
    path, images = tmp_path / 'file.pt', tmp_path / 'images'
    torch.save(content(), path)
    put(images, WNIDS[0], 0)
    with pytest.raises(SystemExit) as stopped:
        main([str(path), '--imagenet', str(images), '--partial'])
    assert str(stopped.value).startswith('CheckpointError: ') and problem in str(stopped.value)


@pytest.mark.parametrize(
    ('model', 'problem'),
    [
        ('timm://no_such_model', "timm has no model 'no_such_model'"),
        ('polynext://no_such_file', 'is not a published file'),
        ('absent.pt', 'absent.pt'),
    ],
)
def test_models_that_are_not_there(model, problem, tmp_path):
    put(tmp_path, WNIDS[0], 0)
    with pytest.raises(SystemExit, match=problem):
        main([model, '--imagenet', str(tmp_path), '--partial'])
