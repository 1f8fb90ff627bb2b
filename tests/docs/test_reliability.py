"""The figures at the top of docs/reliability.md: counted again, from the tests that give them."""

import importlib.util
import math
import sys
from collections.abc import Iterable
from types import ModuleType

import pytest

from helpers import ROOT

PAGE = ROOT / 'docs' / 'reliability.md'
# Tests of which each case plants a mistake and fails where it is not reported, by their module.
MISTAKES = {
    'datasets/test_coco_audit.py': [
        'test_what_is_wrong_is_told',
        'test_corners_are_told_from_extents_by_a_few_boxes_too',
        'test_a_class_in_other_letters_is_told_with_the_right_ones',
        'test_an_unknown_class_is_told_with_those_of_the_file',
        'test_the_order_of_the_file_counts',
        'test_what_cannot_be_read_is_one_error',
    ],
    'datasets/test_loading.py': [
        'test_a_bad_file_is_named_in_training_and_validation',
        'test_labels_of_which_nothing_counts',
        'test_a_contradiction_about_zero_names_the_setting',
        'test_ids_are_those_of_the_file_where_zero_is_reduced',
        'test_a_worker_tells_in_one_line',
        'test_a_truncated_image_of_a_detection_set_is_named',
        'test_a_box_of_a_class_beyond_the_last_is_named',
        'test_a_box_that_is_not_finite_is_named',
    ],
    'engine/test_config_checks.py': [
        'test_a_setting_that_cannot_be_meant_is_refused_with_the_nearest',
        'test_a_coco_metric_is_looked_up_with_its_prefix',
        'test_a_misspelt_key_of_a_file_is_refused',
        'test_each_head_is_held_to_the_classes_of_the_data',
        'test_classes_of_the_data_are_held_to_all_heads',
        'test_the_proposals_have_one_class',
        'test_one_word_is_no_list_of_classes',
    ],
    'engine/test_data_checks.py': [
        'test_an_empty_folder_is_told_with_what_is_there',
        'test_images_without_labels_are_told',
        'test_a_class_in_other_letters_is_told',
        'test_the_hook_checks_the_config',
        'test_a_mistake_in_annotations_is_told_for_every_split',
        'test_a_cut_annotation_file_is_told',
        'test_a_data_set_of_which_nothing_is_left_is_told',
        'test_an_evaluator_of_other_annotations_is_told',
        'test_a_checkpoint_that_does_not_fit_is_told_before_data_is_read',
        'test_a_checkpoint_that_is_not_there_is_told',
        'test_the_tool_ends_with_one_message',
    ],
    'tools/test_check_dataset.py': [
        'test_what_is_wrong_ends_in_1_and_a_hint',
        'test_an_image_that_opencv_alone_cannot_read_is_an_error',
        'test_reduce_zero_label_where_zero_is_a_class',
        'test_an_empty_folder_is_one_error',
        'test_classes_are_compared_with_heads',
        'test_a_missing_data_set_is_one_message',
        'test_mistakes_of_a_detection_set',
        'test_a_cut_annotation_file_is_one_message',
    ],
}
# Parameters that do the same to the same file in several ways, which counts once.
WAYS = ('split', 'load')
VALUES = [
    'test_a_weight_of_another_kind_is_named',
    'test_beyond_half_precision_is_named',
    'test_statistics_that_cannot_be',
    'test_negative_variance_in_a_backbone',
    'test_norms_for_images_of_no_size',
    'test_names_are_held_to_the_backbone',
    'test_two_names_of_the_release_that_become_one',
    'test_what_mmengine_warns_about_is_an_error',
]


def module(path: str) -> ModuleType:
    """A module of tests, imported with its own folder in the path, as pytest does."""
    file = ROOT / 'tests' / path
    spec = importlib.util.spec_from_file_location(f'counted_{file.stem}', file)
    loaded = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'path', [str(file.parent), *sys.path])
        spec.loader.exec_module(loaded)
    return loaded


def cases(tests: ModuleType, names: Iterable[str]) -> int:
    """How many different files or settings some tests try."""
    total = 0
    for name in names:
        marks = getattr(getattr(tests, name), 'pytestmark', [])
        total += math.prod(
            len(mark.args[1])
            for mark in marks
            if mark.name == 'parametrize' and mark.args[0] not in WAYS
        )
    return total


def row(figure: str) -> str:
    return next(line for line in PAGE.read_text().splitlines() if line.startswith(f'| {figure} |'))


def test_kills():
    tests = module('engine/test_kills.py')
    chosen, drawn = tests.CHOSEN_KILLS, tests.RANDOM_KILLS
    assert f'| {chosen + drawn}: {chosen} at chosen moments, {drawn} at random' in row(
        'kills survived'
    )


def test_mutations():
    tests = module('weights/test_fuzz.py')
    slow = tests.SLOW + tests.RESUMED
    told = f'| {tests.FAST + slow}: {tests.FAST} in `make test`, {slow} in `make test-slow` |'
    assert told in row('mutations of files tried')


def test_hostile_files():
    files = module('weights/test_hostile_files.py')
    pickles = cases(files, ['test_no_pickle_calls_anything'])
    values = cases(files, VALUES)
    ways = len(module('weights/test_safety.py').FOR_OUR_MODELS)
    told = row('hostile files refused')
    assert f'| {pickles + values}: {pickles} pickles that call something; {values} with' in told
    assert f'each of {ways} ways' in told


def test_mistakes():
    counts = [cases(module(path), names) for path, names in MISTAKES.items()]
    told = '{} in annotations, {} in files while loading, {} in configs, {} before the first step'
    assert f'| {sum(counts)}, each planted' in row('mistakes caught')
    assert told.format(*counts[:4]) in row('mistakes caught')
    assert f', {counts[4]} by `check_dataset.py`' in row('mistakes caught')
