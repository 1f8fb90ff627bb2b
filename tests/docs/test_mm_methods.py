"""One config of every method that mmseg and mmdet ship, with a PolyNeXt: a step and a prediction.

A sample of the methods by default, all of them with ``POLYNEXT_MM_ALL_METHODS=1``.
"""

from __future__ import annotations

import os

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper

from polynext_mm.engine.models import backbones
from tests.docs import mm_methods
from tests.docs.mm_methods import EXCEPTIONS, PACKAGES, SETTINGS

EVERY = 1 if os.environ.get('POLYNEXT_MM_ALL_METHODS') else 8


def check(package: str, method: str) -> None:
    """Train a method's model for a step, and let it predict."""
    model = revert_sync_batchnorm(mm_methods.build(package, method))
    model.train()  # some models of mmdet's return nothing here
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4))
    # a teacher is no module of its student, and learns nothing
    ours = {f'{name}.': net for name, net in backbones(model).items() if 'teacher' not in name}
    assert ours
    before = {
        prefix + name: param.detach().clone()
        for prefix, backbone in ours.items()
        for name, param in backbone.named_parameters()
    }
    MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0, max_epochs=12))
    losses = model.train_step(mm_methods.batch(package, method, model, True), wrapper)
    assert losses['loss'].isfinite()
    after = dict(model.named_parameters())
    still = [name for name, param in before.items() if torch.equal(param, after[name])]
    assert not still
    model.eval()
    (prediction,) = model.test_step(mm_methods.batch(package, method, model, False))[:1]
    assert prediction is not None


def sample() -> list[tuple[str, str]]:
    found = [
        (package, method)
        for package in PACKAGES
        for method in mm_methods.methods(package)
        if method not in EXCEPTIONS[package]
    ]
    return found[::EVERY]


@pytest.mark.slow
@pytest.mark.parametrize(('package', 'method'), sample())
def test_a_method_trains_a_step_and_predicts(package, method):
    check(package, method)


def test_the_page_has_these_tables():
    written = mm_methods.page_with_tables()
    assert mm_methods.PAGE.read_text(encoding='utf-8') == written, (
        'run `python -m tests.docs.mm_methods`'
    )


def test_the_tables_name_methods_that_there_are():
    for table in (EXCEPTIONS, SETTINGS):
        for package in PACKAGES:
            assert set(table[package]) <= set(mm_methods.methods(package))
