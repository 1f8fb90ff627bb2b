"""benchmarks/run.py as its users run it, at sizes that take no time. Speed is not tested."""

import csv
import math
import sys

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.files import ROOT
from tests.helpers.programs import python, script

pytestmark = pytest.mark.heavy

measure = script('benchmarks/measure')
benchmark = script('benchmarks/run')
report = script('benchmarks/report')
roofline = script('benchmarks/roofline')
subjects = script('benchmarks/subjects')

MODELS = ['cpolynext_t', 'plain:cpolynext_t', 'timm:convformer_s18']
MIB = 1 << 20


def run(folder, *arguments):
    """Run the tool with few steps and return its report, all of which it must have printed."""
    quick = ('--rounds', 2, '--warmup', 1, '--threads', 1)
    tool = ROOT / 'benchmarks' / 'run.py'
    printed = python(tool, *arguments, *quick, '--out', folder)
    report = (folder / 'results.md').read_text()
    assert all(section in printed for section in report.strip().split('\n\n'))
    return report


def read_results(folder, report, name):
    """Return the records of a comparison, which must be drawn and in the report as well."""
    with (folder / f'{name}.csv').open() as file:
        records = list(csv.DictReader(file))
    with Image.open(folder / f'{name}.png') as picture:
        picture.verify()
    assert f'| {" | ".join(records[0])} |' in report
    return records


def assert_positive(records, *columns):
    for record in records:
        for column in columns:
            assert math.isfinite(float(record[column])) and float(record[column]) > 0


@pytest.mark.heavy
def test_models_are_compared(tmp_path):
    modes = ('inference', 'train')
    report = run(
        tmp_path,
        *('--models', *MODELS),
        *('--baseline', MODELS[1]),
        *('--mode', *modes),
        *('--sizes', '64x64'),
    )
    assert 'load average before' in report and 'Largest spread' in report
    records = read_results(tmp_path, report, 'results')
    assert [(r['mode'], r['model']) for r in records] == [
        (mode, model) for mode in modes for model in MODELS
    ]
    assert_positive(records, 'median ms', 'time ratio')
    for record in records:
        assert float(record['q1 ms']) <= float(record['median ms']) <= float(record['q3 ms'])
        assert record['memory format'] in ('contiguous', 'channels_last')
        assert record['peak MiB'] == record['memory ratio'] == ''
    assert [float(r['time ratio']) for r in records if r['model'] == MODELS[1]] == [1, 1]


@pytest.mark.slow
def test_exported_models_are_compared(tmp_path):
    labels = ['cpolynext_t', 'onnxruntime:cpolynext_t', 'openvino:cpolynext_t']
    report = run(tmp_path, '--models', *labels, '--sizes', '64x64')
    records = read_results(tmp_path, report, 'results')
    assert [record['model'] for record in records] == labels
    assert_positive(records, 'median ms', 'time ratio')


@pytest.mark.slow
def test_whole_segmentors_are_compared(tmp_path):
    labels = ['uper:convformer_s18:channels_last', 'uper:cpolynext_t']
    options = ('--mode', 'train', '--batch', 2, '--sizes', '64x64', '--memory')
    report = run(tmp_path, '--models', *labels, *options)
    records = read_results(tmp_path, report, 'results')
    assert [record['model'] for record in records] == labels
    assert_positive(records, 'time ratio', 'peak MiB')
    weights = 54e6 * 4 / MIB
    assert 2 * weights < float(records[0]['peak MiB']) < 4 * weights  # and gradients, and maps


@pytest.mark.slow
def test_peak_memory_of_training(tmp_path):
    report = run(tmp_path, '--models', *MODELS, '--mode', 'train', '--sizes', '64x64', '--memory')
    assert 'process of its own' in report
    records = read_results(tmp_path, report, 'results')
    assert_positive(records, 'time ratio', 'peak MiB', 'memory ratio')
    assert float(records[0]['time ratio']) == float(records[0]['memory ratio']) == 1
    for record in records:
        model = subjects.build_model(subjects.parse_subject(record['model']).variants()[0])
        weights = sum(p.numel() for p in model.parameters()) * 4 / MIB
        assert 2 * weights < float(record['peak MiB']) < 3 * weights  # and gradients, and maps


@pytest.mark.slow
def test_attention_alone_profile_and_floor(tmp_path):
    report = run(
        tmp_path,
        *('--attention', 512, 1024, '--matrix-up-to', 512),
        *('--profile', 'cpolynext_t+fuse'),
        *('--floor', 'cpolynext_t+fuse'),
        *('--sizes', '32x32'),
    )
    records = read_results(tmp_path, report, 'attention')
    assert [(r['tokens'], r['form']) for r in records] == [
        ('512', 'blocks'),
        ('512', 'matrix'),
        ('1024', 'blocks'),
    ]
    assert_positive(records, 'ns per pair', 'peak MiB', 'bytes per token')
    for record in records:
        peak = float(record['peak MiB']) * MIB
        assert float(record['bytes per token']) == pytest.approx(peak / int(record['tokens']))
    five_matrices = 5 * 512**2 * 4
    assert float(records[1]['peak MiB']) * MIB > 2 * five_matrices
    assert 'cpolynext_t+fuse, inference, 32x32, 2 steps' in report
    assert 'Self CPU %' in report and 'aten::mm' in report
    assert 'measured / floor' in report


@pytest.mark.parametrize(
    'model, mode', [('apolynext_t', 'train'), ('plain:cpolynext_t', 'inference')]
)
def test_floor_counts_every_operation(model, mode):
    work = subjects.make_workload(
        subjects.parse_subject(model), subjects.Setting(mode, (64, 64), device='meta')
    )
    floor = roofline.Roofline(flops=1.0, bandwidth=math.inf)
    with floor:
        work.step()
    with FlopCounterMode(display=False) as counter:
        work.step()
    assert floor.flops == floor.seconds == counter.get_total_flops()


def test_peak_of_a_known_step():
    held, scratch = 3 * MIB, 64 * MIB
    peak, method = measure.cpu_peak(subjects.Workload(lambda: torch.ones(scratch // 4), held))
    if method != 'VmHWM':
        pytest.skip('this system cannot set the high-water mark back')
    assert abs(peak - held - scratch) < MIB


def test_peak_where_the_mark_cannot_be_set_back(monkeypatch):
    monkeypatch.setattr(measure, '_reset_high_water', lambda: False)
    peak, method = measure.cpu_peak(subjects.Workload(lambda: None, 3 * MIB))
    assert method == 'ru_maxrss'
    assert 3 * MIB <= peak < 4 * MIB


@pytest.mark.slow
def test_more_than_there_is_does_not_fit():
    attention = subjects.Subject('matrix', 'attention', 'matrix', 'contiguous')
    assert measure.peak_memory(attention, subjects.Setting('train', (200_000,))) == (
        None,
        'did not fit',
    )


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ],
)
def test_what_does_not_fit_is_left_out(error, monkeypatch):
    def fail(subject, setting):
        raise error

    monkeypatch.setattr(measure, 'make_workload', fail)
    model = subjects.parse_subject('timm:convformer_s18')
    (result,) = measure.measure([model], subjects.Setting('train', (64, 64)), 2, 1, memory=True)
    record = report.comparison(result, result)
    assert record['median ms'] is record['time ratio'] is record['memory ratio'] is None
    assert 'timm:convformer_s18, train, 64x64: did not fit' in report.notes([result])


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    def fail(subject, setting):
        raise RuntimeError('shapes do not match')

    monkeypatch.setattr(measure, 'make_workload', fail)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        measure.measure(
            [subjects.parse_subject('cpolynext_t')], subjects.Setting('train', (64, 64)), 2, 1
        )


def test_busy_times_are_doubted():
    subject, setting = (
        subjects.Subject('ours', 'ours', 'cpolynext_t'),
        subjects.Setting('inference', (64, 64)),
    )
    quiet = measure.Result(subject, setting, [1.0, 1.01, 1.02])
    noisy = measure.Result(subject, setting, [1.0, 1.5, 2.0])
    assert 'WARNING' not in report.notes([quiet])
    assert 'WARNING: ours, inference, 64x64: spread 33.3%' in report.notes([noisy])
    assert noisy.time_ratio(quiet) == pytest.approx(1.5 / 1.01)


@pytest.mark.parametrize(
    'label, message',
    [
        ('cpolynext_x', 'choose one of cpolynext_t, cpolynext_s'),
        ('plain:convformer_s18', 'choose one of cpolynext_t, cpolynext_s'),
        ('torchvision:convnext_tiny', 'write ARCH, plain:ARCH, timm:NAME, uper:BACKBONE, onnx'),
        ('timm:convformer_s17', 'did you mean convformer_s18'),
        ('timm:convformer_s18:fast', 'write :contiguous or :channels_last'),
        ('timm:convformer_s18:contiguous:fast', 'write :contiguous or :channels_last'),
        ('plain:cpolynext_t:contiguous', 'only timm: and uper: models take a memory format'),
        ('uper:swin', 'choose one of cpolynext_t, .*convnext_small, swin_tiny$'),
        ('uper:swin_tiny:fast', 'write :contiguous or :channels_last'),
        ('uper:cpolynext_s+cp', 'uper models take none'),
        ('cpolynext_t+fast', r'take \+fuse, \+compile, \+cp'),
        ('timm:convformer_s18+cp', r'timm models take \+compile, \+graph$'),
        ('onnxruntime:cpolynext_x', 'choose one of cpolynext_t, cpolynext_s'),
        ('openvino:cpolynext_t+compile', 'openvino models take none'),
    ],
)
def test_unknown_models_are_named_with_what_there_is(label, message):
    with pytest.raises(ValueError, match=message):
        subjects.parse_subject(label)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((), 'nothing to measure'),
        (('--models', 'cpolynext_x'), 'choose one of cpolynext_t, cpolynext_s'),
        (('--models', 'cpolynext_t', '--sizes', '512'), "'512' is not HEIGHTxWIDTH"),
        (('--models', 'cpolynext_t', '--rounds', '0'), "'0' is not a positive integer"),
        (('--models', 'cpolynext_t', 'cpolynext_t'), 'names a model twice'),
        (
            ('--models', 'cpolynext_t', '--baseline', 'cpolynext_s'),
            'not among --models: cpolynext_t',
        ),
        (('--models', 'cpolynext_t+fuse', '--mode', 'train'), 'leave out +fuse or train'),
        (('--models', 'cpolynext_t+graph'), 'is for --device cuda'),
        (('--floor', 'timm:convformer_s18'), 'write timm:convformer_s18:channels_last'),
        (('--floor', 'cpolynext_t', '--dtype', 'bfloat16'), 'for float32 on the CPU'),
        (('--models', 'onnxruntime:cpolynext_t', '--mode', 'train'), 'inference in float32'),
        (('--models', 'uper:swin_tiny', '--mode', 'train'), 'two images or more: --batch 2'),
        (('--count', 'uper:swin_tiny:contiguous'), 'take backbones alone'),
        (('--profile', 'onnxruntime:cpolynext_t'), 'only --models takes onnxruntime'),
        (('--models', 'cpolynext_t', '--device', 'xpu'), 'no xpu device: use --device cpu'),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['run.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
