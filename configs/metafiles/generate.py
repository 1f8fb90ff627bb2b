"""Generate the metafiles, and the tables of configs and models: ``make tables``.

Writes the metafiles beside this file, model-index.yml, and tables in configs/README.md, README.md
and docs/performance.md. What a config says is read from it, and costs are counted; segmentors were
measured by benchmarks/accuracy_against_time.py, and other figures are below.
tests/configs/test_tables.py fails if a file is out of date.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from mmengine.config import Config

from polynext_mm.analysis import Cost, NeedsValuesError, build_model, count, count_config
from polynext_mm.nn import ARCHS, PolyNeXtClassifier
from polynext_mm.weights import PUBLISHED

METAFILES = Path(__file__).resolve().parent
ROOT = METAFILES.parents[1]
sys.path.append(str(ROOT / 'benchmarks'))
import accuracy_against_time as ade20k  # noqa: E402 - found there

ADE20K_TIMES = ROOT / 'benchmarks' / 'ade20k_times.json'

# Collections: the beginning of a config's name, the method, the title and address of its paper.
COLLECTIONS = {
    'upernet': (
        'UperNet',
        'Unified Perceptual Parsing for Scene Understanding',
        'https://arxiv.org/abs/1807.10221',
    ),
    'semantic_fpn': (
        'Semantic FPN',
        'Panoptic Feature Pyramid Networks',
        'https://arxiv.org/abs/1901.02446',
    ),
    'segformer': (
        'SegFormer',
        'SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers',
        'https://arxiv.org/abs/2105.15203',
    ),
    'mask2former': (
        'Mask2Former',
        'Masked-attention Mask Transformer for Universal Image Segmentation',
        'https://arxiv.org/abs/2112.01527',
    ),
    'mask_rcnn': ('Mask R-CNN', 'Mask R-CNN', 'https://arxiv.org/abs/1703.06870'),
    'cascade_mask_rcnn': (
        'Cascade Mask R-CNN',
        'Cascade R-CNN: High Quality Object Detection and Instance Segmentation',
        'https://arxiv.org/abs/1906.09756',
    ),
    'retinanet': (
        'RetinaNet',
        'Focal Loss for Dense Object Detection',
        'https://arxiv.org/abs/1708.02002',
    ),
    'atss': (
        'ATSS',
        'Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training '
        'Sample Selection',
        'https://arxiv.org/abs/1912.02424',
    ),
    'dino': (
        'DINO',
        'DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection',
        'https://arxiv.org/abs/2203.03605',
    ),
}
# the head, or the detector, that a config of the collection must have
HEADS = {
    'UPerHead': 'UperNet',
    'FPNHead': 'Semantic FPN',
    'SegformerHead': 'SegFormer',
    'Mask2FormerHead': 'Mask2Former',
    'MaskRCNN': 'Mask R-CNN',
    'CascadeRCNN': 'Cascade Mask R-CNN',
    'RetinaNet': 'RetinaNet',
    'ATSS': 'ATSS',
    'DINO': 'DINO',
    'Mask2Former': 'Mask2Former',
}
# data sets by a word of a config's name
DATA = {
    'ade20k': 'ADE20K',
    'cityscapes': 'Cityscapes',
    'voc12aug': 'Pascal VOC 2012 aug',
    'pascal_context': 'PASCAL Context 59',
    'coco': 'COCO 2017',
    'materials': 'demo/materials',
    'landcover': 'demo/landcover',
}
OWN_SAMPLES = ('demo/materials', 'demo/landcover')  # no models of a zoo: not in the metafiles
# of the peers, published in the paper of PolyNeXt; those of PolyNeXt are in polynext_mm.weights
PEERS = {
    f'upernet_{name}_ade20k': ade20k.TASKS['ade20k'].networks[name].accuracy
    for name in ('convformer_s18', 'caformer_s18')
}
MEASURED = {
    'upernet_cpolynext_materials': '76.6 mIoU',
    'atss_cpolynext_materials_pretrained': 'AP50 .702 (1409 iterations)',
    'atss_cpolynext_materials': 'AP50 .345 (1455 iterations)',
    'atss_convnext_atto_materials': 'AP50 .182 (1091 iterations)',
    'atss_resnet18_materials': 'AP50 .638 (895 iterations)',
}
# ms of inference and of a training step, one image of 224x224 in float32, on two cores
TIMES = {
    'cpolynext_t': (43, 165),
    'cpolynext_s': (111, 406),
    'cpolynext_b': (172, 626),
    'cpolynext_l': (210, 738),
    'apolynext_t': (59, 207),
    'apolynext_s': (140, 494),
    'apolynext_b': (204, 732),
    'apolynext_l': (249, 886),
}
FAMILIES = ('cpolynext', 'apolynext', 'convformer', 'caformer', 'convnext', 'resnet')
TITLES = ('CPolyNeXt', 'APolyNeXt', 'ConvFormer', 'CAFormer', 'ConvNeXt', 'ResNet')
Costs = Mapping[str, Mapping[str, object]]  # entries of Metadata, by the config's name


@dataclasses.dataclass(frozen=True)
class Row:
    """What is said of a config."""

    name: str
    backbone: str
    head: str
    data: str
    schedule: str
    published: str  # '' where nobody has published a figure
    weights: str | None  # their url

    @property
    def measured(self) -> str:
        return MEASURED.get(self.name, '')


def describe(name: str) -> Row:
    """Read from a config what it is."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    head = HEADS[cfg.model.get('decode_head', cfg.model).type]
    data = next(title for word, title in DATA.items() if f'_{word}' in name)
    backbone = cfg.model.backbone
    norm = backbone.get('norm', 'ln')
    released = [
        file
        for file in PUBLISHED.values()
        if (file.arch, file.holds, file.norm) == (backbone.get('arch'), data.lower(), norm)
        and head == 'UperNet'
    ]
    figure = released[0].figure if released else PEERS.get(name)
    return Row(
        name,
        backbone=_backbone_title(name, backbone),
        head=head,
        data=data,
        schedule=_schedule(name, cfg),
        published=f'{figure} mIoU' if figure else '',
        weights=released[0].url if released else None,
    )


def _backbone_title(name: str, backbone: Mapping) -> str:
    """Return its name as papers write it: 'CPolyNeXt-S, bn'."""
    arch = backbone.get('arch', backbone.get('model_name', ''))
    if not isinstance(arch, str):
        started = ', pretrained' if backbone.get('init_cfg') else ''
        return f'CPolyNeXt, short{started}'
    family = next(family for family in FAMILIES if family in name)
    title = TITLES[FAMILIES.index(family)]
    size = arch.removeprefix(f'{family}_') or str(backbone['depth'])
    size = size.title() if len(size) > 3 else size.upper()
    return f'{title}-{size}' + (', bn' if backbone.get('norm') == 'bn' else '')


def _schedule(name: str, cfg: Config) -> str:
    epochs, iterations = (cfg.train_cfg.get(f'max_{unit}') for unit in ('epochs', 'iters'))
    if epochs is None:
        said = re.sub('000$', 'k', str(iterations)) + ' iterations'
        in_epochs = re.search(r'_(\d+)e$', name)
        return f'{said}, {in_epochs[1]} epochs' if in_epochs else said
    pipeline = str(cfg.train_dataloader.dataset.pipeline)
    return f'{epochs} epochs' + (', multi-scale' if 'RandomChoiceResize' in pipeline else '')


def rows() -> list[Row]:
    """Describe all configs, in the order in which they are listed."""
    found = [describe(path.stem) for path in (ROOT / 'configs').glob('*.py')]
    methods = [method for method, *_ in COLLECTIONS.values()]
    data = list(DATA.values())

    def order(row: Row) -> tuple:
        family = next(place for place, name in enumerate(FAMILIES) if name in row.name)
        size = re.search('polynext_([tsbl])_', row.name)
        return (
            data.index(row.data) // 4,  # segmentation, COCO, the sample
            methods.index(row.head),
            data.index(row.data),
            row.backbone.endswith(', bn'),
            # Mask R-CNN's short schedule before its long one, all archs each
            row.schedule.endswith('multi-scale'),
            family,
            'tsbl'.index(size[1]) if size else 4,
            row.name,
        )

    return sorted(found, key=order)


def metafile(method: str, title: str, url: str, models: Iterable[Row], costs: Costs) -> dict:
    """Return the content of a metafile."""
    models = list(models)
    return dict(
        Collections=[
            {
                'Name': method,
                'License': 'Apache-2.0',
                'Metadata': {'Training Data': list(dict.fromkeys(row.data for row in models))},
                'Paper': {'Title': title, 'URL': url},
                'README': 'configs/README.md',
            }
        ],
        Models=[_model(row, costs) for row in models],
    )


def _model(row: Row, costs: Costs) -> dict:
    metadata = {
        'Architecture': [row.backbone, row.head],
        'Training Data': row.data,
        'Schedule': row.schedule,
        **costs[row.name],
    }
    model = {
        'Name': row.name,
        'In Collection': row.head,
        'Config': f'configs/{row.name}.py',
        'Metadata': metadata,
    }
    if row.published:
        metadata['Results Reported By'] = 'the authors of PolyNeXt'
        value, metric = row.published.split()
        result = {
            'Task': 'Semantic Segmentation',
            'Dataset': row.data,
            'Metrics': {metric: float(value)},
        }
        model['Results'] = [result]
    if row.weights:
        model['Weights'] = row.weights
    return model


def cost_of(name: str) -> dict[str, object]:
    """Count the parameters of a config, and its multiply-adds where its model runs on meta."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    try:
        cost = count_config(cfg)
    except NeedsValuesError:  # DINO and Mask2Former, whose figure would depend on the image
        with torch.device('meta'):
            model = build_model(cfg, 'meta')
        return {'Parameters': sum(parameter.numel() for parameter in model.parameters())}
    _, height, width = cost.shape
    macs = f'{cost.macs / 1e9:.1f} G multiply-adds at {height}x{width}'
    return {'Parameters': cost.parameters, 'FLOPs': macs}


def costs_as_written() -> Costs:
    """Return what the metafiles say now that configs cost."""
    models = [
        model
        for path in sorted(METAFILES.glob('*.yml'))
        for model in yaml.safe_load(path.read_text())['Models']
    ]
    return {
        model['Name']: {
            key: model['Metadata'][key]
            for key in ('Parameters', 'FLOPs')
            if key in model['Metadata']
        }
        for model in models
    }


def config_tables(found: Sequence[Row]) -> str:
    """Return the tables of configs/README.md: with a figure, and without one."""
    with_figure = [row for row in found if row.published or row.measured]
    without = [row for row in found if row not in with_figure]
    return '\n\n'.join(
        (
            '## Published or measured',
            _table(
                (
                    'config',
                    'backbone',
                    'head',
                    'data set',
                    'schedule',
                    'published',
                    'measured here',
                ),
                [(*_cells(row), row.published, row.measured) for row in with_figure],
            ),
            '## Ready to run',
            'Nobody has published a figure for these, and none has been measured here.',
            _table(
                ('config', 'backbone', 'head', 'data set', 'schedule'),
                [_cells(row) for row in without],
            ),
        )
    )


def _cells(row: Row) -> tuple[str, ...]:
    return f'[{row.name}]({row.name}.py)', row.backbone, row.head, row.data, row.schedule


def models_table() -> str:
    """Return the table of models in README.md, with the costs of the archs as classifiers."""
    lines = []
    for name in TIMES:
        cost = classifier_cost(name)
        lines.append(
            (
                f'`{name}`',
                f'{cost.parameters / 1e6:.2g} M',
                f'{cost.macs / 1e9:.3g} G' if cost.macs >= 1e10 else f'{cost.macs / 1e9:.1f} G',
                str(PUBLISHED[name].figure),
                '{}, {} ms'.format(*TIMES[name]),
                ', '.join(map(str, ARCHS[name].widths)),
            )
        )
    header = ('arch', 'parameters', 'MACs at 224', 'ImageNet top-1', 'inference, training step')
    return _table((*header, 'widths'), lines)


def measured_segmentors() -> tuple[str, str]:
    """Return the tables of README.md and docs/performance.md, with what was measured and how."""
    kept = ade20k.read(ADE20K_TIMES)
    published, measured = ade20k.published(kept), ade20k.table(kept)
    return (
        _table(list(published[0]), [[str(cell) for cell in row.values()] for row in published]),
        f'{ade20k.conditions(kept)}:\n\n{kept["environment"]}\n\n'
        + _table([key.strip() for key in measured[0]], [_cells_of(row) for row in measured]),
    )


def _cells_of(row: Mapping[str, str | float | None]) -> list[str]:
    return [cell if isinstance(cell, str) else f'{cell:.0f}' for cell in row.values()]


def classifier_cost(name: str) -> Cost:
    with torch.device('meta'):
        return count(PolyNeXtClassifier(name), (3, 224, 224))


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    lines = [header, ['---'] * len(header), *lines]
    return (
        '\n'.join(re.sub(r'\|  (?=\|)', '| ', f'| {" | ".join(line)} |') for line in lines)
        .replace('| --- ', '|---')
        .replace('|--- |', '|---|')
    )


def contents(costs: Costs) -> dict[Path, str]:
    """Return the text of every file that is generated, or has a generated part.

    Args:
        costs: As ``cost_of`` returns them, of all configs but those of the sample.
    """
    found = rows()
    written = {}
    for start, (method, title, url) in COLLECTIONS.items():
        models = [row for row in found if row.head == method and row.data not in OWN_SAMPLES]
        assert all(row.name.startswith(start) for row in models), method
        path = METAFILES / (method.lower().replace(' ', '_').replace('-', '_') + '.yml')
        content = metafile(method, title, url, models, costs)
        written[path] = '# Written by `make tables`.\n' + yaml.safe_dump(
            content, sort_keys=False, allow_unicode=True, width=100
        )
    listed = [str(path.relative_to(ROOT)) for path in written]
    written[ROOT / 'model-index.yml'] = yaml.safe_dump({'Import': listed})
    of_readme, of_performance = measured_segmentors()
    parts = {
        'configs/README.md': [config_tables(found)],
        'README.md': [of_readme, models_table()],
        'docs/performance.md': [of_performance],
    }
    for name, in_order in parts.items():
        text = (ROOT / name).read_text(encoding='utf-8')
        before, *rest = text.split('<!-- written by `make tables` -->\n')
        assert len(rest) == len(in_order), (
            f'{name} has {len(rest)} parts: {len(in_order)} are written'
        )
        for part, old in zip(in_order, rest):
            _, end, after = old.partition('\n<!-- to here -->')
            before += f'<!-- written by `make tables` -->\n\n{part}\n{end}{after}'
        written[ROOT / name] = before
    return written


def main() -> None:
    costs = {row.name: cost_of(row.name) for row in rows() if row.data not in OWN_SAMPLES}
    for path, text in contents(costs).items():
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
