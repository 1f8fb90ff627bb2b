"""The methods that mmseg and mmdet ship configs of, with a PolyNeXt by the rules of the docs.

``python -m tests.docs.mm_methods`` writes the tables of exceptions in docs/other_configs.md.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import import_modules_from_strings
from torch import nn

from tests.configs import segmentors
from tests.detection import detectors
from tests.helpers.files import ROOT, mm_folder

PAGE = ROOT / 'docs' / 'other_configs.md'
PACKAGES = ('mmseg', 'mmdet')
WIDTHS = (48, 96, 192, 288)
SIZE = 128

# Why a method's config does not take another backbone, or does not run here.
EXCEPTIONS = {
    'mmseg': {
        'ddrnet': 'its head takes the two branches of its own backbone',
        'dpt': 'its head takes patches and class tokens of a ViT',
        'mobilenet_v3': 'its head pools maps of at least 49x49',
        'pidnet': 'its head takes the three branches of its own backbone',
        'psanet': "needs mmcv's compiled operators (`psamask`)",
        'san': 'a side network of CLIP',
        'vpd': 'a diffusion model',
    },
    'mmdet': {
        'bytetrack': 'needs the package lap; only its detector, YOLOX, is trained',
        'carafe': "needs mmcv's compiled operators (`carafe`)",
        'centripetalnet': 'its head takes the two outputs of an hourglass network',
        'clrnet': 'a lane detector whose code lies elsewhere',
        'common': 'parts of configs',
        'cornernet': 'its head takes the two outputs of an hourglass network',
        'deepsort': 'trackers of trained detectors: no training of their own',
        'detectors': 'its neck is a second backbone (RFP)',
        'glip': 'needs a language model',
        'grounding_dino': 'needs a language model',
        'mm_grounding_dino': 'needs a language model',
        'lad': 'needs scikit-learn',
        'misc': 'detectors of detectron2',
        'ocsort': 'needs the package lap; only its detector, YOLOX, is trained',
        'paa': 'needs scikit-learn',
        'queryinst': 'trains; the masks of untrained boxes cannot be pasted, so not tested',
        'reid': 'needs mmpretrain',
        'simple_copy_paste': 'its batch norms (`MMSyncBN`) need several processes',
        'strong_baselines': 'its batch norms (`MMSyncBN`) need several processes',
        'tridentnet': 'its heads take the three branches of its own backbone',
    },
}
# What a method needs besides the rules, by keys of the model.
SETTINGS: dict[str, dict[str, dict]] = {
    'mmseg': {
        'cgnet': {'decode_head.channels': 288},
        'dmnet': {'backbone.out_contiguous': True},
        'encnet': {
            'backbone.out_indices': (2, 3),
            'decode_head.in_channels': [192, 288],
            'decode_head.in_index': [0, 1],
            'auxiliary_head.in_index': 0,
        },
        'fastfcn': {'neck.in_channels': (96, 192, 288), 'auxiliary_head.in_channels': 192},
    },
    'mmdet': {
        'nas_fcos': {
            'backbone.out_indices': (0, 1, 2, 3),
            'backbone.out_norm': False,
            'neck.in_channels': [48, 96, 192, 288],
            'neck.start_level': 1,
        },
        'ssd': {
            'neck.in_channels': (192, 288),
            'neck.out_channels': (192, 288, 512, 256, 256, 256),
            'bbox_head.in_channels': (192, 288, 512, 256, 256, 256),
        },
    },
}
# The config where it is not the first with a ResNet-50 and a neck, or the first of all.
CONFIGS = {
    ('mmdet', 'strongsort'): 'yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval',
    ('mmseg', 'setr'): 'setr_vit-l_naive_8xb2-160k_ade20k-512x512',
}
# Sides of images where the usual one is too small.
SIZES = {('mmdet', 'dino'): 256, ('mmdet', 'ssd'): 512}


def methods(package: str) -> list[str]:
    """Return the folders of configs, one a method."""
    folders = (mm_folder(package) / 'configs').iterdir()
    return sorted(
        folder.name
        for folder in folders
        if folder.is_dir() and folder.name != '_base_' and any(folder.glob('*.py'))
    )


def config(package: str, method: str) -> Config:
    """Read the config that stands for a method; modules that it imports are for :func:`build`."""
    files = sorted((mm_folder(package) / 'configs' / method).glob('*.py'))
    name = CONFIGS.get((package, method))
    if name is None:
        names = [file.stem for file in files]
        name = next(
            (name for name in names if 'r50' in name and not re.search('[-_]d?c[45]', name)),
            names[0],
        )
    return Config.fromfile(files[0].with_name(f'{name}.py'), import_custom_modules=False)


def dicts(node: object) -> Iterator[dict]:
    """Yield all dicts in a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from dicts(value)


def put_backbone(model: dict, stages: list[int]) -> None:
    model['backbone'] = dict(
        type='PolyNeXt', _scope_='mmengine', arch='cpolynext_t', out_indices=stages
    )


def adapt_segmentor(model: dict) -> None:
    """Replace the backbone of a segmentor by the rules of the docs, in place."""
    neck = model.get('neck')
    if neck is not None and neck['type'] in ('Feature2Pyramid', 'MLANeck'):
        neck = model['neck'] = None
    if neck is not None:
        stages = [0, 1, 2, 3][-len(neck['in_channels']) :]
        neck['in_channels'] = [WIDTHS[stage] for stage in stages]
        put_backbone(model, stages)
        return
    given = [model['decode_head'], model.get('auxiliary_head') or []]
    outer = [head for one in given for head in (one if isinstance(one, (list, tuple)) else [one])]
    heads = [
        head
        for head in dicts(outer)
        if 'in_channels' in head and ('in_index' in head or any(head is one for one in outer))
    ]
    indices = []
    for head in heads:
        given, count = head.get('in_index', -1), head['in_channels']
        if isinstance(count, (list, tuple)) and not isinstance(given, (list, tuple)):
            given = [0, 1, 2, 3][-len(count) :]
        given = given if isinstance(given, (list, tuple)) else [given]
        indices.append([index + 4 if index < 0 else index for index in given])
    # the last output that they use becomes the last stage
    shift = 3 - max(index for of_head in indices for index in of_head)
    indices = [[max(index + shift, 0) for index in of_head] for of_head in indices]
    used = {index for of_head in indices for index in of_head}
    if any('c1_in_channels' in head for head in heads):
        used.add(0)
    stages = sorted(used)
    for head, own in zip(heads, indices):
        channels, places = [WIDTHS[i] for i in own], [stages.index(i) for i in own]
        several = isinstance(head['in_channels'], (list, tuple))
        head['in_channels'] = channels if several else channels[0]
        head['in_index'] = places if several else places[0]
        if 'c1_in_channels' in head:
            head['c1_in_channels'] = WIDTHS[0]
    put_backbone(model, stages)


def adapt_detector(model: dict) -> None:
    """Replace the backbone of a detector by the rules of the docs, in place."""
    neck = model.get('neck')
    first = neck[0] if isinstance(neck, (list, tuple)) else neck
    if first is None:  # heads that take the outputs themselves
        first = model.get('panoptic_head') or model['track_head']
    given = first['in_channels']
    if isinstance(given, int):
        first['in_channels'] = WIDTHS[3]
        put_backbone(model, [3])
        return
    stages = [0, 1, 2, 3][-len(given) :]
    if first.get('start_level'):
        stages, first['start_level'] = stages[first['start_level'] :], 0
    channels = [WIDTHS[stage] for stage in stages]
    first['in_channels'] = channels if list(given) == sorted(given) else channels[::-1]
    put_backbone(model, stages)


def build(package: str, method: str) -> nn.Module:
    """Build a method's model with a PolyNeXt, with few regions and no weights fetched."""
    cfg = config(package, method)
    model = copy.deepcopy(cfg.model)
    learned = any('num_proposals' in part for part in dicts(model))  # whose number is fixed
    for part in dicts(model):
        for key in ('pretrained', 'batch_augments'):
            part.pop(key, None)
        if 'teacher_ckpt' in part:
            part['teacher_ckpt'] = None
        if isinstance(part.get('teacher_config'), str):
            part['teacher_config'] = str(mm_folder(package) / part['teacher_config'])
        if isinstance(part.get('init_cfg'), dict) and part['init_cfg'].get('type') == 'Pretrained':
            part['init_cfg'] = None
        if isinstance(part.get('sampler'), dict) and 'num' in part['sampler']:
            part['sampler']['num'] = 16
        for key, few in (('max_per_img', 20), ('nms_pre', 50)):
            if isinstance(part.get(key), int) and not learned:
                part[key] = few
    if package == 'mmseg':
        adapt_segmentor(model)
        size = SIZES.get((package, method), SIZE)
        model.data_preprocessor['size'] = (size, size)
        model.test_cfg = dict(mode='whole')
    else:
        for part in list(dicts(model)):
            if isinstance(part.get('backbone'), dict):
                adapt_detector(part)
    whole = Config(dict(model=model))
    for key, value in SETTINGS[package].get(method, {}).items():
        whole.merge_from_dict({f'model.{key}': value})
    init_default_scope(cfg.default_scope)
    imports = cfg.get('custom_imports', {}).get('imports', [])
    for name in [imports] if isinstance(imports, str) else imports:
        if not name.startswith('mmpretrain'):  # for the backbone that is replaced
            import_modules_from_strings(name)
    importlib.import_module(f'{package}.models')
    torch.manual_seed(0)
    built = MODELS.build(whole.model)
    built.init_weights()
    return built


def batch(package: str, method: str, model: nn.Module, training: bool) -> dict:
    """Return a batch of what the method's data loaders give, two images or, in prediction, one."""
    size = SIZES.get((package, method), SIZE)
    if package == 'mmseg':
        heads = model.decode_head
        head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
        return segmentors.batch(size, head.num_classes)
    data = detectors.batch(size, 2 if training else 1)
    classes = [part.get('num_classes') for part in dicts(config(package, method).model)]
    of_one_class = 1 in classes
    for sample in data['data_samples']:
        labels = torch.zeros(1, size, size, dtype=torch.long)
        if of_one_class:
            sample.gt_instances.labels.zero_()
        sample.gt_sem_seg = PixelData(sem_seg=labels)
        if not getattr(model, 'with_rpn', True):  # as Fast R-CNN
            boxes = sample.gt_instances.bboxes + 3
            sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(2))
    kind = type(model.data_preprocessor).__name__
    if kind == 'TrackDataPreprocessor' and not model.data_preprocessor.use_det_processor:
        return of_videos(data)
    if kind == 'MultiBranchDataPreprocessor' and training:
        return of_branches(data)
    return data


def of_videos(data: dict) -> dict:
    """Return one video of the images of a batch: a key frame and, in training, a reference."""
    from mmdet.structures import TrackDataSample

    video = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1]))
    video.video_data_samples = data['data_samples']
    for frame, sample in enumerate(video.video_data_samples):
        sample.gt_instances.instances_ids = torch.tensor([1, 2])
        sample.set_metainfo(
            dict(frame_id=frame, img_id=frame, video_id=0, video_length=2, ori_video_length=2)
        )
    return dict(inputs=[torch.stack(data['inputs'])], data_samples=[video])


def of_branches(data: dict) -> dict:
    """Return a batch of semi-supervised training: labelled, and twice without labels."""
    for sample in data['data_samples']:
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype='float32'), img_id=0))
    branches = ('sup', 'unsup_teacher', 'unsup_student')
    return dict(
        inputs={branch: data['inputs'] for branch in branches},
        data_samples={
            branch: [sample.clone() for sample in data['data_samples']] for branch in branches
        },
    )


def table(package: str) -> str:
    """Return the docs' table for a package: what needs more than the rules, and exceptions."""
    lines = [f'| folder of {package} | with a PolyNeXt |', '|---|---|']
    settings = {
        method: ' '.join(f'`{key}={value!r}`'.replace("'", '') for key, value in of_method.items())
        for method, of_method in SETTINGS[package].items()
    }
    rows = settings | {method: f'no: {why}' for method, why in EXCEPTIONS[package].items()}
    lines += [f'| `{method}` | {text} |' for method, text in sorted(rows.items())]
    return '\n'.join(lines) + '\n'


def page_with_tables() -> str:
    """Return docs/other_configs.md with the tables of this module."""
    text = PAGE.read_text(encoding='utf-8')
    for package in PACKAGES:
        start, end = f'<!-- {package}: written by tests/docs/mm_methods.py -->\n', '<!-- end -->'
        before, _, rest = text.partition(start)
        text = before + start + table(package) + end + rest.partition(end)[2]
    return text


if __name__ == '__main__':
    PAGE.write_text(page_with_tables(), encoding='utf-8')
