"""polynext-mm predict: every kind of input, and what is written besides pictures."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from PIL import Image
from pycocotools.coco import COCO

from polynext_mm.commands.predict import main
from polynext_mm.commands.predict_inputs import Clip, find_inputs
from polynext_mm.compat.torch_features import AUTOCAST_BY_DEVICE
from tests.helpers.files import contents
from tests.marks import needs
from tests.small_models import CLASSES, PALETTE, write_detector, write_segmentor


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp('segmentor'))


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp('detector'))


def write_image(path: Path, size=(64, 96), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with three pictures, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        write_image(Path(f'photos/{index}.png'), seed=index)
    return Path('photos')


@pytest.fixture
def video(tmp_path, monkeypatch):
    """A video of five frames."""
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter('clip.avi', cv2.VideoWriter_fourcc(*'MJPG'), 10, (96, 64))
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        writer.write(pixels)
    writer.release()
    return Path('clip.avi')


def predict(model, *arguments) -> int:
    config, weights = model
    *inputs, options = arguments if isinstance(arguments[-1], list) else (*arguments, [])
    options = map(str, [*options, '--device', 'cpu'])
    return main([*map(str, inputs), str(config), str(weights), *options])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# Inputs


def test_a_pattern_and_several_inputs(photos, segmentor, capsys):
    MMLogger.get_instance('predict')  # the current one may print elsewhere, after a training here
    write_image(photos / 'deep' / '0.png', seed=7)
    assert predict(segmentor, 'photos/**/*.png', ['--out', 'drawn']) == 0
    assert sorted(map(str, Path('drawn').rglob('*.png'))) == [
        'drawn/0.png',
        'drawn/1.png',
        'drawn/2.png',
        'drawn/deep/0.png',
    ]
    printed = capsys.readouterr()
    assert 'wrote 4 pictures to drawn, drawn/deep' in printed.out
    assert not printed.err and 'loaded 105 of 105' in printed.out and 'mmengine' not in printed.out
    assert len(printed.out.splitlines()) == 3
    assert predict(segmentor, 'photos/0.png', 'photos/1.png', ['--out', 'two']) == 0
    assert sorted(path.name for path in Path('two').iterdir()) == ['0.png', '1.png']
    assert (pixels('two/0.png') == pixels('drawn/0.png')).all()


def test_broken_pictures_are_named_and_left_out(photos, segmentor, capsys):
    whole = (photos / '1.png').read_bytes()
    (photos / '1.png').write_bytes(whole[: len(whole) // 2])
    (photos / '2.png').write_text('<html>not found</html>')
    os.mkfifo(photos / '3.png')  # nobody ever writes into it
    assert predict(segmentor, photos) == 1
    assert [path.name for path in Path('predictions/photos').iterdir()] == ['0.png']
    printed = capsys.readouterr().err
    assert 'left out 3 of 4' in printed and '3.png is no file' in printed
    assert '1.png' in printed and 'cut short' in printed
    assert '2.png' in printed and 'a text or web page' in printed


def test_a_video(video, segmentor):
    options = ['--labels', 'labels', '--json', 'results.json', '--no-legend']
    assert predict(segmentor, video, options) == 0
    written = cv2.VideoCapture('predictions/clip.mp4')
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert written.get(cv2.CAP_PROP_FPS) == 10
    assert written.read()[1].shape == (64, 96, 3)
    names = [f'clip_{index:06}' for index in range(5)]
    assert sorted(path.stem for path in Path('labels').iterdir()) == names
    images = json.loads(Path('results.json').read_text())['images']
    assert [image['file_name'] for image in images] == names


def test_a_video_of_detections(video, detector):
    options = ['--json', 'found.json', '--score-thr', 0, '--out', 'boxes.avi', '--batch-size', 2]
    assert predict(detector, video, options) == 0
    assert cv2.VideoCapture('boxes.avi').get(cv2.CAP_PROP_FRAME_COUNT) == 5
    images = json.loads(Path('found.json').read_text())['images']
    assert {(image['width'], image['height']) for image in images} == {(96, 64)}


def test_a_camera(video, segmentor, monkeypatch):
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, 'VideoCapture', lambda source: capture('clip.avi' * (source == 0)))
    options = ['--max-frames', 3, '--out', 'seen.avi']
    assert predict(segmentor, '0', options) == 0
    assert capture('seen.avi').get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert predict(segmentor, '1') == 1


def test_ctrl_c_ends_a_recording(video, segmentor, monkeypatch, capsys):
    class Interrupted:
        def __init__(self, source):
            self.capture, self.frames = opened('clip.avi'), 0

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def read(self):
            self.frames += 1
            if self.frames > 3:
                raise KeyboardInterrupt
            return self.capture.read()

    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, 'VideoCapture', Interrupted)
    assert predict(segmentor, '0', ['--out', 'seen.avi', '--legend']) == 0
    assert 'ended by Ctrl-C' in capsys.readouterr().err
    assert opened('seen.avi').get(cv2.CAP_PROP_FRAME_COUNT) == 2  # the third was not drawn yet


@pytest.mark.parametrize(
    ('inputs', 'out', 'message'),
    [
        (['nothing/*.jpg'], None, r'no image or video matches nothing/\*\.jpg'),
        (['clip.avi'], 'drawn.png', '--out must end in one of .avi'),
        (['photos/0.png', 'absent.png'], None, 'there is no image absent.png'),
    ],
)
def test_inputs_that_cannot_be(photos, video, inputs, out, message):
    with pytest.raises(ValueError, match=message):
        find_inputs(inputs, out and Path(out))


@pytest.mark.parametrize(
    ('inputs', 'options', 'message'),
    [
        (['photos/0.png', 'other/0.png'], [], 'two inputs would be written to predictions/0.png'),
        (['clip.*'], [], 'two inputs would be written to predictions/clip.mp4'),
        (['photos/0.png'], ['--out', 'photos/0.png'], 'photos/0.png is an input and would be'),
        (['photos'], ['--out', 'photos'], 'photos/0.png is an input and would be overwritten'),
        (['photos/*.png'], ['--out', 'photos'], 'photos/0.png is an input and would be'),
        (['clip.avi'], ['--out', 'clip.avi'], 'clip.avi is an input and would be overwritten'),
        (['link.png'], ['--out', 'photos/0.png'], 'photos/0.png is an input and would be'),
        (['photos/0.png'], ['--out', 'hard.png'], 'hard.png is an input and would be'),
        (['photos'], ['--labels', 'photos'], 'photos/0.png is an input .* take another --labels'),
        (['photos'], ['--out', 'o', '--labels', 'o'], '--out and --labels would be written to o/'),
        (['photos'], ['--json', 'photos/1.png'], 'photos/1.png is an input .* another --json'),
        (['photos/0.png'], ['--json', 'CONFIG'], 'is an input and would be .* another --json'),
        (['photos/0.png'], ['--json', 'WEIGHTS'], 'is an input and would be .* another --json'),
    ],
)
def test_results_replace_nothing(photos, video, segmentor, inputs, options, message):
    write_image(Path('other/0.png'))
    Path('link.png').symlink_to('photos/0.png')
    os.link('photos/0.png', 'hard.png')
    Path('clip.mov').write_bytes(video.read_bytes())
    before = contents(Path('.'))
    model = dict(zip(('CONFIG', 'WEIGHTS'), segmentor))
    with pytest.raises(SystemExit, match=message):
        predict(segmentor, *inputs, [model.get(option, option) for option in options])
    assert contents(Path('.')) == before


def test_links_are_drawn_under_their_own_names(photos):
    Path('links').mkdir()
    for name in ('a.png', 'b.png'):
        (Path('links') / name).symlink_to(Path('../photos') / '0.png')
    found = find_inputs(['links/*.png'], None)
    assert [str(one.target) for one in found] == ['predictions/a.png', 'predictions/b.png']


def test_a_number_is_a_camera_unless_there_is_a_file(photos):
    assert find_inputs(['3'], None) == [Clip(3, Path('predictions/camera3.mp4'))]
    write_image(Path('3/a.png'))
    assert [found.path for found in find_inputs(['3'], None)] == [Path('3/a.png')]


# Outputs


def test_label_maps_and_shares(photos, segmentor):
    assert predict(segmentor, photos, ['--labels', 'ids', '--json', 'new/shares.json']) == 0
    ids = [pixels(f'ids/{index}.png') for index in range(3)]
    assert {image.shape for image in ids} == {(64, 96)}
    content = json.loads(Path('new/shares.json').read_text())
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    for image, written in zip(content['images'], ids):
        expected = {CLASSES[i]: np.mean(written == i) for i in np.unique(written)}
        assert image['shares'] == pytest.approx(expected, abs=1e-6)
        assert (image['width'], image['height']) == (96, 64)


def test_label_maps_of_clips_stay_apart(video, segmentor):
    for name in ('a', 'b'):
        Path(name).mkdir()
        (Path(name) / 'clip.avi').write_bytes(video.read_bytes())
    assert predict(segmentor, '[ab]/clip.avi', ['--labels', 'ids', '--max-frames', 2]) == 0
    assert sorted(str(path) for path in Path('ids').rglob('*.png')) == [
        f'ids/{name}/clip_{index:06}.png' for name in 'ab' for index in range(2)
    ]


def test_classes_that_the_checkpoint_does_not_name_are_the_configs(photos, segmentor):
    config, weights = segmentor
    nameless = Path('nameless.pth')
    torch.save(dict(state_dict=torch.load(weights)['state_dict']), nameless)
    mine = Path('mine.py')
    names = ('a', 'b', 'c')
    mine.write_text(
        f"_base_ = '{config}'\n"
        f"test_dataloader = dict(dataset=dict(_delete_=True, type='BaseSegDataset',"
        f' metainfo=dict(classes={names}), pipeline=_base_.test_pipeline))\n'
    )
    assert predict((mine, nameless), photos / '0.png', ['--json', 'found.json']) == 0
    categories = json.loads(Path('found.json').read_text())['categories']
    assert [category['name'] for category in categories] == list(names)


def test_opacity(photos, segmentor):
    for opacity in ('0', '1'):
        options = ['--opacity', opacity, '--legend', '--labels', 'ids', '--out', f'{opacity}.png']
        assert predict(segmentor, 'photos/0.png', options) == 0
    assert (pixels('0.png')[:64, :96] == pixels('photos/0.png')).all()
    assert (pixels('1.png')[:64, :96] == np.array(PALETTE)[pixels('ids/0.png')]).all()


def test_a_legend_shows_the_colours_of_what_is_there(photos, segmentor):
    options = ['--legend', '--labels', 'ids', '--out', 'legend.png']
    assert predict(segmentor, 'photos/0.png', options) == 0
    strip = pixels('legend.png')[64:]
    colours = {tuple(map(int, colour)) for colour in strip.reshape(-1, 3)}
    present = set(np.unique(pixels('ids/0.png')).tolist())
    assert {i for i, colour in enumerate(PALETTE) if tuple(colour) in colours} == present


def test_batches_and_half_precision_change_little(photos, segmentor):
    labels = {}
    for name, options in (
        ('one', []),
        ('batch', ['--batch-size', 2]),
        ('half', ['--dtype', 'bfloat16']),
    ):
        assert predict(segmentor, photos, ['--labels', name, *options]) == 0
        labels[name] = np.stack([pixels(f'{name}/{index}.png') for index in range(3)])
    assert (labels['one'] == labels['batch']).mean() > 0.999
    assert (labels['one'] == labels['half']).mean() > 0.8


def test_sliding_windows_keep_the_size(photos, segmentor, monkeypatch):
    from mmseg.models import EncoderDecoder

    seen = []
    encode_decode = EncoderDecoder.encode_decode
    monkeypatch.setattr(
        EncoderDecoder,
        'encode_decode',
        lambda self, x, metas: seen.append(tuple(x.shape[2:])) or encode_decode(self, x, metas),
    )
    large = write_image(Path('large.png'), (150, 200))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # PIL's limit against zip bombs
    assert predict(segmentor, large, ['--slide', 64, '--labels', 'ids']) == 0
    assert pixels('ids/large.png').shape == (150, 200)
    assert set(seen) == {(64, 64)} and len(seen) == 4 * 5


def test_detections_in_cocos_format(photos, detector):
    options = ['--json', 'found.json', '--score-thr', 0, '--batch-size', 3]
    assert predict(detector, photos, options) == 0
    coco = COCO('found.json')
    assert [image['file_name'] for image in coco.loadImgs(coco.getImgIds())] == [
        f'photos/{index}.png' for index in range(3)
    ]
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert annotations
    for annotation in annotations:
        x, y, width, height = annotation['bbox']
        assert 0 <= x <= x + width <= 96.01 and 0 <= y <= y + height <= 64.01
        assert 0 < annotation['score'] <= 1
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 96) and mask.sum() == annotation['area']
    low = min(annotation['score'] for annotation in annotations)
    assert predict(detector, photos, ['--json', 'fewer.json', '--score-thr', low]) == 0
    assert len(COCO('fewer.json').anns) < len(annotations)


@needs(AUTOCAST_BY_DEVICE)  # older CPUs' operators of mmdet take no bfloat16
def test_detections_in_half_precision(photos, detector):
    options = ['--json', 'found.json', '--score-thr', 0, '--dtype', 'bfloat16']
    assert predict(detector, photos, options) == 0
    assert COCO('found.json').anns


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--labels', 'ids'], '--labels is for segmentors'),
        (['--slide', '64'], 'slide is for segmentors'),
        (['--device', 'abacus'], 'device abacus cannot be used'),
    ],
)
def test_options_that_do_not_go_with_a_detector(photos, detector, options, message):
    config, weights = detector
    with pytest.raises(SystemExit, match=message):
        main(['photos', str(config), str(weights), *options])


def test_labels_of_the_data_set_are_not_written_over(photos, segmentor):
    config, weights = segmentor
    for index in range(3):
        write_image(Path(f'data/images/{index}.jpg'))
        write_image(Path(f'data/truth/{index}.png'))
    before = contents(Path('data'))
    mine = Path('mine.py')
    mine.write_text(
        f"_base_ = '{config}'\n"
        "test_dataloader = dict(dataset=dict(_delete_=True, type='BaseSegDataset',"
        " data_root='data', data_prefix=dict(img_path='images', seg_map_path='truth'),"
        ' pipeline=_base_.test_pipeline, metainfo=dict(classes=("a", "b", "c"))))\n'
    )
    with pytest.raises(SystemExit, match='data/truth/0.png is an input .* another --labels'):
        predict((mine, weights), photos, ['--labels', 'data/truth'])
    assert contents(Path('data')) == before


def test_a_work_dir_is_config_and_checkpoint(photos, segmentor):
    config, weights = segmentor
    folder = Path('work_dirs/mine')
    folder.mkdir(parents=True)
    (folder / 'mine.py').write_text(f"_base_ = '{config}'\n")
    (folder / 'best_mIoU_iter_5.pth').write_bytes(weights.read_bytes())
    assert main(['photos', str(folder), '--device', 'cpu']) == 0
    assert len(list(Path('predictions/photos').iterdir())) == 3
    with pytest.raises(SystemExit, match='no checkpoint iter_7.pth.*; .* has best_mIoU_iter_5.pth'):
        main(['photos', str(folder), 'iter_7.pth'])
    with pytest.raises(SystemExit, match='photos is a folder without a config'):
        main(['photos'])


def test_a_tiny_picture_stops_nothing(photos, segmentor, detector):
    write_image(photos / '1.png', (5, 40))
    (photos / '2.png').write_text('<html>not found</html>')
    for model in (segmentor, detector):
        assert predict(model, photos, ['--json', 'found.json']) == 1
        images = json.loads(Path('found.json').read_text())['images']
        assert [(image['width'], image['height']) for image in images] == [(96, 64), (40, 5)]


def test_few_boxes_are_said_to_be_few(photos, detector, capsys):
    assert predict(detector, photos, ['--score-thr', 0.99]) == 0
    printed = capsys.readouterr()
    assert 'found 0 boxes in 3 images' in printed.out
    assert 'a lower --score-thr shows more' in printed.err
