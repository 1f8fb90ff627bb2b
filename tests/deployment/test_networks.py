"""Networks for export compute what mm computes, from raw images and from preprocessed ones."""

import pytest
import torch
from torch import nn

from polynext_mm.deployment import UnsupportedModelError, fused, make_network
from polynext_mm.deployment.networks import AnySizePool
from tests.deployment import small
from tests.helpers import zipped
from tests.helpers.networks import build

SIZES = [(32, 32), (33, 70), (96, 64)]


def raw_images(height, width, batch=2):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def assert_close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('padding', [None, dict(size_divisor=32)], ids=['as they are', 'padded'])
@torch.no_grad()
def test_segmentor(size, padding):
    from mmseg.structures import SegDataSample

    options = {'data_preprocessor.test_cfg': padding}
    model = small.model(small.config(small.SEGMENTOR, **options))
    images = raw_images(*size)
    samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in images]
    results = model.test_step(dict(inputs=list(images), data_samples=samples))
    expected = torch.stack([result.seg_logits.data for result in results])
    (logits,) = make_network(model, 'logits', preprocess=True)(images)
    assert_close(logits, expected)
    (labels,) = make_network(model, 'labels', preprocess=True)(images)
    assert labels.equal(torch.cat([result.pred_sem_seg.data for result in results]))
    if padding is None:
        prepared = model.data_preprocessor(dict(inputs=list(images)))['inputs']
        (logits,) = make_network(model)(prepared)
        assert_close(logits, expected)


@torch.no_grad()
def test_segmentor_with_one_logit():
    options = {'decode_head.out_channels': 1, 'decode_head.num_classes': 2}
    options['decode_head.threshold'] = 0.4
    options['decode_head.loss_decode.use_sigmoid'] = True
    model = small.model(small.config(small.SEGMENTOR, **options))
    images = torch.randn(2, 3, 64, 64)
    expected = torch.stack([result.pred_sem_seg.data[0] for result in model.predict(images)])
    (labels,) = make_network(model, 'labels')(images)
    assert labels.equal(expected.long())
    assert 0 < labels.float().mean() < 1


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', [small.RETINANET, small.ATSS])
@torch.no_grad()
def test_detector(name, size):
    from mmdet.structures import DetDataSample

    model = small.model(small.config(name))
    images = raw_images(*size)
    samples = [DetDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in images]
    data = model.data_preprocessor(dict(inputs=list(images), data_samples=samples))
    everything = dict(nms_pre=10**6, score_thr=-1, min_bbox_size=-1)
    results = model.bbox_head.predict_by_feat(
        *model.bbox_head(model.extract_feat(data['inputs'])),
        batch_img_metas=[sample.metainfo for sample in data['data_samples']],
        cfg=model.bbox_head.test_cfg.__class__(everything),
        with_nms=False,
    )
    boxes, scores = make_network(model, preprocess=True)(images)
    for own_boxes, own_scores, result in zipped(boxes, scores, results):
        # mm's are in the order of their scores, one for each class
        given = torch.cat(
            (own_boxes.repeat_interleave(scores.shape[-1], 0), own_scores.reshape(-1, 1)), 1
        )
        expected = torch.cat((result.bboxes, result.scores[:, None]), 1)
        assert len(given) == len(expected)
        distance = torch.cdist(expected, given, compute_mode='donot_use_mm_for_euclid_dist')
        assert max(distance.amin(0).max(), distance.amin(1).max()) < 1e-3
        assert_close(given[:, -1].sort().values, result.scores.sort().values)


def test_features_are_those_of_the_backbone():
    model = small.model(small.config(small.SEGMENTOR, **{'backbone.out_indices': (0, 1, 2, 3)}))
    images = torch.randn(1, 3, 64, 48)
    network = make_network(model, 'features')
    assert network.output_names == ('feature_0', 'feature_1', 'feature_2', 'feature_3')
    with torch.no_grad():
        for feature, expected in zipped(network(images), model.backbone(images)):
            assert feature.equal(expected)


@pytest.mark.parametrize('out', [1, 2, 3, 6, (2, 5)])
@pytest.mark.parametrize('size', [(1, 1), (2, 7), (6, 6), (13, 32)])
def test_pooling_for_any_size(out, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    height, width = (out, out) if isinstance(out, int) else out
    expected = nn.AdaptiveAvgPool2d(out)(x)
    torch.testing.assert_close(AnySizePool(height, width)(x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_fusing_leaves_the_network_as_it_was():
    network = make_network(small.model(small.config(small.SEGMENTOR)))
    images = torch.randn(2, 3, 40, 50)
    (expected,) = network(images)
    copy = fused(network)
    assert_close(copy(images)[0], expected)
    kinds = {type(layer) for layer in copy.modules()}
    assert not kinds & {nn.AdaptiveAvgPool2d, nn.BatchNorm2d, nn.SyncBatchNorm}
    assert network(images)[0].equal(expected)


def changed(name, **options):
    return lambda: small.model(small.config(name, **options))


@pytest.mark.parametrize(
    ('make', 'output', 'message'),
    [
        (changed(small.SEGMENTOR), 'boxes', 'those with RetinaHead or ATSSHead'),
        (changed(small.ATSS), 'labels', 'it is no segmentor'),
        (
            changed(small.RETINANET, **{'bbox_head.type': 'FreeAnchorRetinaHead'}),
            'boxes',
            'boxes of FreeAnchorRetinaHead: of detectors, those with RetinaHead or ATSSHead',
        ),
        (changed(small.SEGMENTOR, **{'backbone.norm': 'bn'}), 'logits', 'for every position of'),
    ],
)
def test_what_cannot_be_exported_is_named(make, output, message):
    with pytest.raises(UnsupportedModelError, match=message):
        make_network(make(), output)


def test_heads_with_logits_of_their_own_are_named():
    from mmseg.models.decode_heads import UPerHead

    class OwnHead(UPerHead):
        def predict_by_feat(self, seg_logits, batch_img_metas):
            return seg_logits

    model = small.model(small.config(small.SEGMENTOR))
    model.decode_head.__class__ = OwnHead
    with pytest.raises(UnsupportedModelError, match='OwnHead has its own way of making logits'):
        make_network(model)


def test_an_unknown_output_is_named():
    model = nn.Module()
    model.backbone = build()
    with pytest.raises(ValueError, match='output must be one of features, logits, labels, boxes'):
        make_network(model, 'masks')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'data_preprocessor.test_cfg': dict(size=(64, 64))}, 'pads to a fixed size'),
        ({'data_preprocessor.mean': None, 'data_preprocessor.std': None}, 'has no mean and std'),
    ],
)
def test_preprocessing_that_cannot_be_exported_is_named(options, message):
    model = small.model(small.config(small.SEGMENTOR, **options))
    with pytest.raises(UnsupportedModelError, match=message):
        make_network(model, preprocess=True)
