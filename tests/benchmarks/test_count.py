"""What a step costs a GPU, counted without one."""

import pytest
import torch

from tests.helpers.programs import script

count = script('benchmarks/count')
subjects = script('benchmarks/subjects')

# model, mode: launches, GB moved, at most
BOUNDS = {
    ('cpolynext_s', 'inference'): (800, 16.5),
    ('cpolynext_s', 'train'): (2300, 46.5),
    ('apolynext_s', 'inference'): (950, 17),
    ('apolynext_s', 'train'): (2800, 48.5),
}


@pytest.mark.parametrize(('model', 'mode'), BOUNDS)
def test_launches_and_bytes_stay_within_bounds(model, mode):
    record = count.costs(
        subjects.parse_subject(model), subjects.Setting(mode, (512, 512), 8, 'bfloat16'), 'h100'
    )
    launches, gigabytes = BOUNDS[model, mode]
    assert launches * 0.9 < record['launches'] <= launches
    assert gigabytes * 0.9 < record['GB moved'] <= gigabytes
    assert record['synchronizations'] == 0


def test_launches_do_not_depend_on_the_batch():
    subject = subjects.parse_subject('cpolynext_t')
    settings = (subjects.Setting('train', (512, 512), n, 'bfloat16') for n in (2, 8))
    records = [count.costs(subject, setting, 'h100') for setting in settings]
    assert records[0]['launches'] == records[1]['launches']


def test_a_known_network_is_counted_as_torch_computes_it():
    """ConvFormer's multiply-adds: 20.6 G at 512x512 in inference (torch's counter)."""
    subject = subjects.parse_subject('timm:convformer_s18:channels_last')
    record = count.costs(subject, subjects.Setting('inference', (512, 512), 1, 'float32'), 'h100')
    assert record['TFLOP'] == pytest.approx(2 * 20.6e-3, rel=0.01)


@pytest.mark.parametrize(
    ('depth', 'sizes', 'launches'),
    [
        (1, [8] * 110, 1),
        (1, [8] * 111, 2),
        (2, [8] * 64, 1),
        (2, [8] * 65, 2),
        (4, [8] * 72, 2),
        (2, [320 * 65536], 1),
        (2, [320 * 65536 + 1, 8], 2),
        (3, [65536 * 300, 65536 * 300], 2),
    ],
)
def test_operations_on_many_tensors_take_as_many_launches_as_torchs(depth, sizes, launches):
    lists = [[torch.empty(n, device='meta') for n in sizes] for _ in range(depth)]
    assert count.launches_of_lists(lists) == launches


def test_tensors_of_several_strides_are_taken_one_by_one():
    wide, narrow = torch.empty(4, 3, device='meta'), torch.empty(4, 3, device='meta')
    assert count.launches_of_lists([[wide, wide], [narrow, narrow]]) == 1
    assert count.launches_of_lists([[wide, wide, wide], [narrow, narrow, narrow.t().t()]]) == 1
    transposed = torch.empty(3, 4, device='meta').t()
    assert count.launches_of_lists([[wide, wide, wide], [narrow, narrow, transposed]]) == 3
