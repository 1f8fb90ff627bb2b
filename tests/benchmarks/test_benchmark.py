"""benchmarks/run.py, run as its users do, at sizes that take no time. How fast is not tested."""

import csv
import math
import subprocess
import sys

import benchmark
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import measure
from measure import (
    MODIFIERS,
    Setting,
    Subject,
    Workload,
    build_model,
    make_workload,
    parse_subject,
    peak_memory,
)

MODELS = ['cpolynext_t', 'plain:cpolynext_t', 'timm:convformer_s18']
QUICK = ('--rounds', '2', '--warmup', '1', '--threads', '1')
MIB = 1 << 20


def run(*arguments):
    """Run the tool; the finished process with its output."""
    return subprocess.run(
        [sys.executable, benchmark.__file__, *map(str, arguments)], capture_output=True, text=True
    )


def read_results(folder, table='results.csv', plot='results.png'):
    """The records of a CSV file, whose plot and Markdown table must be there as well."""
    with (folder / table).open() as file:
        records = list(csv.DictReader(file))
    with Image.open(folder / plot) as picture:
        picture.verify()
    report = (folder / 'results.md').read_text()
    assert f'| {" | ".join(records[0])} |' in report
    return records


def assert_positive(records, *columns):
    for record in records:
        for column in columns:
            assert math.isfinite(float(record[column])) and float(record[column]) > 0


def test_models_are_compared(tmp_path):
    done = run(
        '--models',
        *MODELS,
        '--mode',
        'inference',
        'train',
        '--sizes',
        '64x64',
        '--baseline',
        MODELS[1],
        '--out',
        tmp_path,
        *QUICK,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (tmp_path / 'results.md').read_text().strip()
    assert 'load average before' in done.stdout and 'Largest spread' in done.stdout
    records = read_results(tmp_path)
    assert [(r['mode'], r['model']) for r in records] == [
        (mode, model) for mode in ('inference', 'train') for model in MODELS
    ]
    assert_positive(records, 'median ms', 'time ratio')
    for record in records:
        assert float(record['q1 ms']) <= float(record['median ms']) <= float(record['q3 ms'])
        assert record['memory format'] in ('contiguous', 'channels_last')
        assert record['peak MiB'] == record['memory ratio'] == ''
    assert [float(r['time ratio']) for r in records if r['model'] == MODELS[1]] == [1, 1]


def test_peak_memory_of_training(tmp_path):
    done = run(
        '--models',
        *MODELS,
        '--mode',
        'train',
        '--sizes',
        '64x64',
        '--memory',
        '--out',
        tmp_path,
        *QUICK,
    )

    assert done.returncode == 0, done.stderr
    assert 'process of its own' in done.stdout
    records = read_results(tmp_path)
    assert_positive(records, 'time ratio', 'peak MiB', 'memory ratio')
    assert float(records[0]['time ratio']) == float(records[0]['memory ratio']) == 1
    for record in records:
        model = build_model(parse_subject(record['model']).variants()[0])
        weights = sum(p.numel() for p in model.parameters()) * 4 / MIB
        assert 2 * weights < float(record['peak MiB']) < 3 * weights  # and gradients, and maps


def test_attention_alone_profile_and_floor(tmp_path):
    done = run(
        '--attention',
        512,
        1024,
        '--matrix-up-to',
        512,
        '--profile',
        'cpolynext_t+fuse',
        '--floor',
        'cpolynext_t+fuse',
        '--sizes',
        '32x32',
        '--out',
        tmp_path,
        *QUICK,
    )

    assert done.returncode == 0, done.stderr
    records = read_results(tmp_path, 'attention.csv', 'curve.png')
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
    assert '| operation | share | ms per step | calls per step |' in done.stdout
    assert '| aten::mm |' in done.stdout
    assert 'measured / floor' in done.stdout


@pytest.mark.parametrize(
    'model, mode', [('apolynext_t', 'train'), ('plain:cpolynext_t', 'inference')]
)
def test_floor_counts_every_operation(model, mode):
    work = make_workload(parse_subject(model), Setting(mode, (64, 64), device='meta'))
    roofline = benchmark.Roofline(flops=1.0, bandwidth=math.inf)
    with roofline:
        work.step()
    with FlopCounterMode(display=False) as counter:
        work.step()
    assert roofline.flops == roofline.seconds == counter.get_total_flops()


def test_peak_of_a_known_step():
    held, scratch = 3 * MIB, 64 * MIB
    peak, method = measure._cpu_peak(Workload(lambda: torch.ones(scratch // 4), held))
    if method != 'VmHWM':
        pytest.skip('this system cannot set the high-water mark back')
    assert abs(peak - held - scratch) < MIB


def test_peak_where_the_mark_cannot_be_set_back(monkeypatch):
    monkeypatch.setattr(measure, '_reset_high_water', lambda: False)
    peak, method = measure._cpu_peak(Workload(lambda: None, 3 * MIB))
    assert method == 'ru_maxrss'
    assert 3 * MIB <= peak < 4 * MIB


def test_more_than_there_is_does_not_fit():
    attention = Subject('matrix', 'attention', 'matrix', 'contiguous')
    assert peak_memory(attention, Setting('train', (200_000,))) == (None, 'did not fit')


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
    model = parse_subject('timm:convformer_s18')
    (result,) = benchmark.measure(
        [model], Setting('train', (64, 64)), rounds=2, warmup=1, memory=True
    )
    record = benchmark.comparison(result, result)
    assert record['median ms'] is record['time ratio'] is record['memory ratio'] is None
    assert 'timm:convformer_s18, train, 64x64: did not fit' in benchmark.notes([result])


def test_busy_times_are_doubted():
    subject, setting = Subject('ours', 'ours', 'cpolynext_t'), Setting('inference', (64, 64))
    quiet = benchmark.Result(subject, setting, [1.0, 1.01, 1.02])
    noisy = benchmark.Result(subject, setting, [1.0, 1.5, 2.0])
    assert 'WARNING' not in benchmark.notes([quiet])
    assert 'WARNING: ours, inference, 64x64: spread 33.3%' in benchmark.notes([noisy])
    assert benchmark.time_ratio(noisy, quiet) == pytest.approx(1.5 / 1.01)


@pytest.mark.parametrize(
    'label, message',
    [
        ('cpolynext_x', 'choose one of cpolynext_t, cpolynext_s'),
        ('plain:convformer_s18', 'choose one of cpolynext_t, cpolynext_s'),
        ('torchvision:convnext_tiny', 'write ARCH, plain:ARCH or timm:NAME'),
        ('timm:convformer_s17', 'did you mean convformer_s18'),
        ('timm:convformer_s18:fast', 'one of :contiguous, :channels_last'),
        ('timm:convformer_s18:contiguous:fast', 'one of :contiguous, :channels_last'),
        ('plain:cpolynext_t:contiguous', 'a timm model, and no other'),
        ('cpolynext_t+fast', r'take \+fuse, \+compile, \+cp'),
        ('timm:convformer_s18+cp', r'timm models take \+compile$'),
    ],
)
def test_unknown_models_are_named_with_what_there_is(label, message):
    with pytest.raises(ValueError, match=message):
        parse_subject(label)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((), 'nothing to measure'),
        (('--models', 'cpolynext_x'), 'choose one of cpolynext_t, cpolynext_s'),
        (('--models', 'cpolynext_t', '--sizes', '512'), "'512' is not HEIGHTxWIDTH"),
        (('--models', 'cpolynext_t', '--rounds', '0'), "'0' is not a positive integer"),
        (('--models', 'cpolynext_t', 'cpolynext_t'), 'a model twice'),
        (
            ('--models', 'cpolynext_t', '--baseline', 'cpolynext_s'),
            'not among --models: cpolynext_t',
        ),
        (('--models', 'cpolynext_t+fuse', '--mode', 'train'), 'leave out +fuse or train'),
        (('--floor', 'timm:convformer_s18'), 'write timm:convformer_s18:channels_last, say'),
        (('--floor', 'cpolynext_t', '--dtype', 'bfloat16'), 'for float32 on the CPU'),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *arguments])
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    'label',
    [
        f'{prefix}+{modifier}'
        for family, prefix in {
            'ours': 'cpolynext_t',
            'plain': 'plain:cpolynext_t',
            'timm': 'timm:convformer_s18',
        }.items()
        for modifier in MODIFIERS[family]
    ],
)
def test_every_modifier_can_be_asked_for(label):
    assert parse_subject(label).label == label
