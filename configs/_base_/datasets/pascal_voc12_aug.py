# Pascal VOC 2012 with 21 classes, trained on its training set and the additional labels of SBD:
# mmseg's pipelines. mmseg's tools/dataset_converters/voc_aug.py makes SegmentationClassAug and
# aug.txt.
_base_ = 'ade20k.py'
dataset_type = 'PascalVOCDataset'
data_root = 'data/VOCdevkit/VOC2012'
train_dataloader = dict(
    batch_size=4,  # on 4 GPUs
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type=dataset_type,
                data_root=data_root,
                data_prefix=dict(img_path='JPEGImages', seg_map_path=labels),
                ann_file=f'ImageSets/Segmentation/{split}.txt',
                pipeline=_base_.train_pipeline,
            )
            for labels, split in (('SegmentationClass', 'train'), ('SegmentationClassAug', 'aug'))
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
        ann_file='ImageSets/Segmentation/val.txt',
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
