"""Checks of data and checkpoints before the first step, to report mistakes in the first minute.

`tools/train.py` and `tools/test.py` call :func:`check_before_data`. With mm's own tools,
DataCheckHook, in the custom_hooks of our base configs, does the same as soon as mmengine calls a
hook.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...compat.mmengine import loops as built_loops
from ..random_numbers import restored
from .coco import CocoAudit, audit_coco, read_coco
from .config import TASKS, check_config, datasets_of, metainfo_of
from .decoding import Decoder, count_ids, image_decoder, read_header
from .findings import (
    UNREADABLE,
    DataError,
    Finding,
    binary_fault,
    bits_finding,
    is_local,
    listed,
)
from .loading import CheckedPipeline, check_loading, leaves
from .model import channel_fault, input_channels
from .sizes import size_findings
from .survey import spread

# Samples read from each data set before the first step, evenly spread; takes tenths of a second.
SAMPLES = 32
_BINARY = 1000  # labels to read if those of all SAMPLES look like binary masks
_SCALING = ('Albu', 'Normalize')
_PICTURES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_TASKS = dict(train=('train', 'val'), val=('val',), test=('test',))
_checked: weakref.WeakSet[Runner] = weakref.WeakSet()


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Check config and data before the first step, and every sample as it is loaded.

    It is for tools other than ours. mmengine calls hooks only after data sets are built, so a file
    that cannot be read at all raises mm's own error. Upstream's IterBasedTrainLoop starts its
    workers even earlier: there, samples are checked before the first step and in validation, but
    not in those workers.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        loops = built_loops(runner)
        if runner not in _checked:
            _checked.add(runner)
            check_config(runner.cfg)
            check_sources(runner.cfg, list(loops))
        for loop in loops.values():
            check_samples(loop.dataloader, runner.cfg)


def check_before_data(runner: Runner, task: str) -> None:
    """Check what the data loaders of a task will read, and let them check what they load.

    Args:
        runner: The runner, built but not started.
        task: Its method, 'train', 'val' or 'test'.

    Raises:
        DataError: On every rank, with a line for everything that is wrong.
    """
    _checked.add(runner)
    check_sources(runner.cfg, _TASKS[task])
    build = runner.build_dataloader

    def build_checked(dataloader: Any, *args, **kwargs) -> DataLoader:
        try:
            loader = build(dataloader, *args, **kwargs)
        except ValueError as error:
            if 'need at least one array' not in str(error):
                raise
            settings = dataloader['dataset']
            raise DataError(
                f'{settings.get("type")} (data_root={settings.get("data_root")}) has no samples: '
                'check data_root, data_prefix, ann_file, and filter_cfg, which may have left out '
                'all'
            ) from error
        check_samples(loader, runner.cfg)
        return loader

    runner.build_dataloader = build_checked  # on this runner only


def without_checks(cfg: Config) -> None:
    """Take the hook out of a config, in place."""
    cfg.custom_hooks = [
        hook
        for hook in cfg.get('custom_hooks') or []
        if not isinstance(hook, Mapping) or hook.get('type') != 'DataCheckHook'
    ]


# Checks before anything is built


def check_sources(cfg: Config, tasks: Iterable[str]) -> None:
    """Check lists of images and annotation files, and print what they hold.

    One process reads; all raise the same error.

    Raises:
        DataError: With a line for everything that is wrong.
    """
    message: list[str | None] = [None]
    if is_main_process():
        try:
            lines, findings = inspect_sources(cfg, tasks)
            for line in lines:
                print_log(line, logger='current')
            for finding in findings:
                if not finding.serious:
                    print_log(str(finding), logger='current', level=logging.WARNING)
            serious = [str(finding) for finding in findings if finding.serious]
            message[0] = '\n  '.join(serious) or None
        except DataError as error:
            message[0] = str(error)
    broadcast_object_list(message)
    if message[0]:
        raise DataError(message[0])


def inspect_sources(cfg: Config, tasks: Iterable[str]) -> tuple[list[str], list[Finding]]:
    """Return lines to print about what the data sets of some loaders hold, and findings."""
    lines: list[str] = []
    findings: list[Finding] = [*class_findings(cfg), *scale_findings(cfg)]
    for task in tasks:
        loader = cfg.get(f'{task}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        audits = []
        for place, settings in datasets_of(dataset, f'{task}_dataloader.dataset'):
            source = lazily_built(cfg, settings, place)
            if source is None:
                continue
            if not hasattr(source, 'label_map'):
                found = audit(source, settings)
                audits.append(found)
                lines.append(_box_table(place, found))
                findings += found.findings
            else:
                pairs, missing = list_pairs(source, place)
                lines.append(f'{place}: {len(pairs)} images in {_folder(source)}')
                findings += missing
                if task != 'train' and not missing:
                    findings += size_findings(cfg, task, settings, [image for image, _ in pairs])
        findings += _evaluator_findings(cfg, task, audits)
    return lines, list(dict.fromkeys(findings))


def lazily_built(cfg: Config, settings: Mapping, place: str) -> Any:
    """Return a data set that has read nothing yet, to ask it for its paths and classes.

    None if it is not checked: neither mmseg's nor in COCO's format, or not on a local disk.

    Raises:
        DataError: If it rejects its classes.
    """
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope') or 'mmengine') as registry:
        kind = settings.get('type')
        factory = registry.get(kind) if isinstance(kind, str) else kind
        if settings.get('backend_args') or not (
            hasattr(factory, 'COCOAPI') or hasattr(factory, 'get_label_map')
        ):
            return None
        quick = {**settings, 'pipeline': [], 'lazy_init': True}
        try:
            source = registry.build(quick)
            return source if hasattr(source, 'label_map') or _is_coco(source) else None
        except ValueError as error:  # mmseg: classes that are not among those of the data set
            known = factory.METAINFO.get('classes') or ()
            wrong = [
                name
                for name in (settings.get('metainfo') or {}).get('classes', ())
                if name not in known
            ]
            if not wrong or not known:
                raise
            alike = {str(name).strip().casefold(): name for name in known}
            raise DataError(
                f'{place}: {kind} has no class {listed(wrong)}: write '
                + listed(alike.get(str(name).strip().casefold(), listed(known)) for name in wrong)
            ) from error


def _is_coco(source: Any) -> bool:
    """Return whether a data set reads its file as CocoDataset does.

    Those that read it differently (LVIS, panoptic) expect other content.
    """
    from mmdet.datasets import CocoDataset

    return (
        isinstance(source, CocoDataset)
        and type(source).load_data_list is CocoDataset.load_data_list
        and type(source).parse_data_info is CocoDataset.parse_data_info
    )


def audit(source: Any, settings: Mapping) -> CocoAudit:
    """Look through the annotation file of a data set in COCO's format.

    Args:
        source: The data set, lazily built.
        settings: Its settings in the config.
    """
    with_mask = any(
        isinstance(step, Mapping) and step.get('with_mask') for step in settings.get('pipeline', ())
    )
    return audit_coco(
        source.ann_file,
        source.metainfo.get('classes'),
        source.data_prefix.get('img'),
        with_mask,
        None if source.test_mode else source.filter_cfg,
    )


def _box_table(place: str, audit: CocoAudit) -> str:
    total = sum(audit.usable.values())
    width = max([len(str(name)) for name in audit.usable] + [5])
    left_out = audit.images - audit.kept
    filtered = f' ({left_out} of them left out by filter_cfg)' if left_out else ''
    lines = [
        f'{place}: {audit.images} images{filtered}, {total} of {audit.boxes} boxes usable',
        f'  {"class":<{width}} {"boxes":>8} {"images":>8}',
    ]
    for name, boxes in audit.usable.items():
        lines.append(f'  {name:<{width}} {boxes:>8} {audit.with_class[name]:>8}')
    return '\n'.join(lines)


def _folder(source: Any) -> str:
    return str(Path(source.data_prefix.get('img_path') or source.data_root or '.'))


def list_pairs(source: Any, place: str) -> tuple[list[tuple[str, str | None]], list[Finding]]:
    """List the images and labels of an mmseg data set, and find what is missing.

    Args:
        source: The data set, lazily built.
        place: Its name in messages.
    """
    folder = _folder(source)
    if not os.path.exists(folder):
        return [], [
            Finding(f'{place}: there is no folder {folder}', 'check data_root and data_prefix')
        ]
    entries = source.load_data_list()
    images = [entry['img_path'] for entry in entries if is_local(entry.get('img_path'))]
    labels = [entry.get('seg_map_path') for entry in entries if is_local(entry.get('img_path'))]
    pairs = list(zip(images, labels))
    findings = list(_unread(source, place, images, labels))
    if not entries:
        suffixes = Counter(path.suffix for path in Path(folder).rglob('*') if path.is_file())
        there = listed(f'{count} {suffix}' for suffix, count in suffixes.most_common()) or 'none'
        finding = Finding(
            f'{place}: no file in {folder} ends in {source.img_suffix} (files there: {there})',
            'check data_root, data_prefix.img_path and img_suffix of the data set',
        )
        return pairs, [finding]
    missing = _absent(images)
    if missing:
        findings.append(
            Finding(
                f'{place}: {len(missing)} of {len(images)} images are not there '
                f'({listed(missing)})',
                f'check ann_file ({source.ann_file}) and data_prefix.img_path',
            )
        )
    missing = _absent([label for label in labels if label])
    if missing:
        findings.append(
            Finding(
                f'{place}: {len(missing)} of {len(images)} images have no label '
                f'({listed(missing)})',
                'label files are named as their images, with seg_map_suffix '
                f'({source.seg_map_suffix}) in place of {source.img_suffix}: check both, and '
                'data_prefix.seg_map_path',
            )
        )
    return pairs, findings


def _unread(
    source: Any, place: str, images: Sequence[str], labels: Sequence[str | None]
) -> Iterator[Finding]:
    """Find images that do not end in img_suffix, and labels without an image."""
    if source.ann_file and not os.path.isdir(source.ann_file):
        return  # ann_file says which files are meant
    known = {*images, *filter(None, labels)}
    folder, label_folder = _folder(source), source.data_prefix.get('seg_map_path')
    suffix = source.seg_map_suffix
    beside = label_folder and Path(folder).resolve() in [
        Path(label_folder).resolve(),
        *Path(label_folder).resolve().parents,
    ]
    others = [
        path
        for path in _files_below(folder)
        if path.lower().endswith(_PICTURES)
        and path not in known
        and not (beside and path.endswith(suffix))
    ]
    # a longer suffix such as _image.png selects images on purpose
    if images and others and source.img_suffix.lower() in _PICTURES:
        kinds = Counter(os.path.splitext(path)[1] for path in others)
        counts = listed(f'{count} {kind}' for kind, count in kinds.most_common())
        yield Finding(
            f'{place}: {len(others)} images in {folder} do not end in {source.img_suffix} and are '
            f'left out ({counts})',
            f'give all the suffix {source.img_suffix}, or make a second data set of another '
            'img_suffix and join both by ConcatDataset',
            serious=False,
        )
    if not label_folder:
        return
    alone = [
        path for path in _files_below(label_folder) if path.endswith(suffix) and path not in known
    ]
    if alone and suffix.lower() in _PICTURES and images:
        yield Finding(
            f'{place}: {len(alone)} labels in {label_folder} are without an image '
            f'({listed(sorted(alone))})',
            f'check that their images are in {folder} and end in {source.img_suffix}',
            serious=False,
        )


def _files_below(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(root, name) for name in names)


def _absent(paths: Sequence[str]) -> list[str]:
    """Return the missing paths, by listing folders, since probing files is slow on file servers."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    absent = []
    for folder, wanted in folders.items():
        present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        absent += [path for path in wanted if os.path.basename(path) not in present]
    return absent


def _evaluator_findings(cfg: Config, task: str, audits: Sequence[CocoAudit]) -> Iterator[Finding]:
    """Find an evaluator that does not read the annotations of its data set."""
    evaluators = cfg.get(f'{task}_evaluator') if task != 'train' else None
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators or []
    for evaluator in evaluators:
        if not isinstance(evaluator, Mapping) or not str(evaluator.get('type')).endswith(
            'CocoMetric'
        ):
            continue
        path = evaluator.get('ann_file')
        if not path or not is_local(path) or evaluator.get('backend_args') or not audits:
            continue
        if any(os.path.abspath(path) == os.path.abspath(audit.path) for audit in audits):
            continue
        what = f'{task}_evaluator.ann_file={path}, and {task}_dataloader reads {audits[0].path}'
        remedy = 'give both the same file'
        if not os.path.isfile(path):
            yield Finding(f'{what}: there is no such file', remedy)
            continue
        known = {image['id'] for image in read_coco(path)['images']}
        strange = set().union(*(audit.image_ids for audit in audits)) - known
        if strange:
            yield Finding(f'{what}: {len(strange)} images of it are not in the former', remedy)


def class_findings(cfg: Config) -> Iterator[Finding]:
    """Find data sets whose classes differ in name or order, and names that occur twice.

    Labels are indices into this list, so another list gives the same labels a different meaning.
    """
    model = cfg.get('model')
    if isinstance(model, Mapping) and 'tracker' in model:  # a tracker is tested on another data set
        return
    first: tuple[str, list] | None = None
    for task in TASKS:
        loader = cfg.get(f'{task}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        for place, settings in datasets_of(dataset, f'{task}_dataloader.dataset'):
            classes = metainfo_of(cfg, settings).get('classes')
            if classes is None or settings.get('return_classes'):
                continue
            classes = list(classes)
            twice = [name for name, count in Counter(classes).items() if count > 1]
            if twice:
                yield Finding(
                    f'{place}: metainfo.classes has {listed(map(repr, twice))} more than once',
                    'give each class a name of its own',
                )
            first = first or (place, classes)
            if len(classes) != len(
                first[1]
            ):  # comparing with the heads reports a different number, and says more
                continue
            other = next((pair for pair in zip(first[1], classes) if pair[0] != pair[1]), None)
            if other:
                how = 'in another order' if set(classes) == set(first[1]) else 'of other names'
                yield Finding(
                    f'{place} has classes {how} than {first[0]} (class {first[1].index(other[0])} '
                    f'is {other[1]!r} and {other[0]!r}), and labels are places in this list',
                    'give all data sets the same metainfo.classes in the same order; files in '
                    "COCO's format may list their categories in any",
                )


def scale_findings(cfg: Config) -> Iterator[Finding]:
    """Find mean and std meant for pixels in 0..1 if the pipeline returns pixels in 0..255."""
    model = cfg.get('model')
    preprocessor = model.get('data_preprocessor') if isinstance(model, Mapping) else None
    if not isinstance(preprocessor, Mapping):
        return
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    if not mean or not std or max(mean) > 1 or max(std) >= 1:
        return
    for task in TASKS:
        loader = cfg.get(f'{task}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        for place, settings in datasets_of(dataset, f'{task}_dataloader.dataset'):
            steps = settings.get('pipeline') or ()
            decoder = image_decoder(steps)
            if decoder and decoder.flag != 'unchanged' and not _may_scale(cfg, steps):
                yield Finding(
                    f'model.data_preprocessor has mean={list(mean)} and std={list(std)}, which are '
                    f'of pixels from 0 to 1, and {place} gives pixels from 0 to 255',
                    'multiply both by 255',
                )
                return


def _may_scale(cfg: Config, steps: Iterable[Mapping]) -> bool:
    """Return whether a step of a pipeline may rescale pixels: any step that is not mm's own."""
    with TRANSFORMS.switch_scope_and_registry(cfg.get('default_scope') or 'mmengine') as registry:
        for step in steps:
            kind = step.get('type')
            factory = registry.get(kind) if isinstance(kind, str) else kind
            package = str(getattr(factory, '__module__', '')).partition('.')[0]
            if package not in ('mmcv', 'mmseg', 'mmdet') or factory.__name__ in _SCALING:
                return True
    return False


# Checks as soon as a data set is built


def check_samples(loader: DataLoader, cfg: Config | None = None) -> None:
    """Make a loader check what it loads from now on, and load some samples of its data sets.

    Args:
        loader: Its workers have not started.
        cfg: Config of the model that takes the samples; by default, channels are not compared.

    Raises:
        DataError: For the first sample that no model can learn from, or whose number of channels
            is not the network's.
    """
    unchecked = [
        leaf for leaf in leaves(loader.dataset) if not isinstance(_pipeline(leaf), CheckedPipeline)
    ]
    check_loading(loader.dataset)
    for leaf in unchecked:
        pipeline = _pipeline(leaf)
        if isinstance(pipeline, CheckedPipeline):
            with restored():  # so that later code draws the same numbers
                _load_some(leaf, pipeline)
    wanted = None if cfg is None else input_channels(cfg)
    if wanted is not None and unchecked and len(loader.dataset):
        with restored():
            sample = loader.dataset[0]
        inputs = sample.get('inputs') if isinstance(sample, Mapping) else None
        if isinstance(inputs, torch.Tensor) and inputs.ndim == 3:
            fault = channel_fault(len(inputs), wanted, cfg.model)
            if fault:
                raise DataError(f'the images of {_folder(unchecked[0])} {fault}')


def _pipeline(leaf: Any) -> Any:
    return getattr(leaf, 'pipeline', None)


def _load_some(leaf: Any, pipeline: CheckedPipeline) -> None:
    steps = pipeline.transforms
    loading = [i for i, step in enumerate(steps) if type(step).__name__.startswith('Load')]
    if not loading:
        return
    positions = spread(SAMPLES, len(leaf))
    trial = copy.copy(pipeline)
    trial.transforms = steps[: loading[-1] + 1]
    trial.patience = len(positions)
    ids = _ids_of(leaf, trial, positions)
    if binary_fault(ids, pipeline.num_classes):
        # a rare class may be in samples that were not read
        for position in spread(_BINARY, len(leaf)):
            ids |= _ids_of(leaf, trial, [position])
            if not binary_fault(ids, pipeline.num_classes):
                break
        else:
            fault = binary_fault(ids, pipeline.num_classes)
            raise DataError(f'the labels of {_folder(leaf)} {fault}')
    decoder = image_decoder(steps)
    if decoder and decoder.flag != 'unchanged' and is_main_process():
        _tell_of_pixels(leaf, positions, decoder)


def _ids_of(leaf: Any, trial: CheckedPipeline, positions: Sequence[int]) -> set[int]:
    """Load samples; return the ids in their labels, if they have any."""
    ids: set[int] = set()
    for position in positions:
        data = trial(leaf.get_data_info(position))
        if trial.is_segmentation and data and 'gt_seg_map' in data:
            ids.update(count_ids(data['gt_seg_map']))
    return ids


def _tell_of_pixels(leaf: Any, positions: Sequence[int], decoder: Decoder) -> None:
    """Warn about the first image that loses bits in decoding."""
    for position in positions:
        path = leaf.get_data_info(position).get('img_path')
        if not is_local(path):
            return
        with open(path, 'rb') as file:
            content = file.read()
        try:
            bits = read_header(content, decoder).bits
        except UNREADABLE:  # the pipeline uses another decoder
            continue
        if bits > 8:
            print_log(str(bits_finding(path, bits)), logger='current', level=logging.WARNING)
            return
