"""polynext-mm doctor: what it tells of a sound installation, and of what is broken."""

import shutil
import sys
from importlib import metadata

import pytest
import torch

from polynext_mm.commands import doctor
from polynext_mm.compat import torch_features
from polynext_mm.compat.torch_features import COMPILE_CELLS
from tests.helpers.checkpoints import imagenet_weights, segmentor_file
from tests.helpers.configs import tiny_config
from tests.helpers.files import ROOT
from tests.marks import needs

NAME = 'upernet_cpolynext_t_ade20k'


@pytest.fixture
def examine(capsys, monkeypatch):
    """Run the command with some of its checks; return its exit code and what it printed."""

    def run(*arguments, only=()):
        kept = {name: check for name, check in doctor.CHECKS.items() if name in only}
        monkeypatch.setattr(doctor, 'CHECKS', kept)
        return doctor.main(list(map(str, arguments))), capsys.readouterr().out

    return run


@pytest.mark.heavy
def test_a_sound_installation(examine):
    code, printed = examine(only=doctor.CHECKS)
    assert code == 0, printed
    assert printed.splitlines()[-1] == 'all works' and 'FAIL' not in printed
    for name in ('torch', 'numpy', 'mmengine', 'mmcv', 'mmseg', 'mmdet'):
        assert f'{sys.modules[name].__version__}' in printed
    assert 'forward and backward: cpu float32, cpu bfloat16' in printed
    assert ("polynext_mm's stand in" in printed) == hasattr(sys.modules['mmcv._ext'], 'why_missing')


@pytest.mark.heavy
@pytest.mark.parametrize('hidden', ['mmengine', 'mmcv'])
def test_without_the_mm_packages(examine, monkeypatch, hidden):
    monkeypatch.setitem(sys.modules, hidden, None)
    code, printed = examine(only=['mm packages'])
    assert code == 1 and printed.endswith('something is broken: see FAIL above\n')
    assert f'polynext_mm needs {hidden}, which is not installed: run `pip install' in printed


@pytest.mark.heavy
def test_two_sets_in_one_place(examine, monkeypatch, tmp_path):
    for name in ('onedl_mmengine', 'mmengine'):
        folder = tmp_path / f'{name}-1.0.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
    found = list(metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(metadata, 'distributions', lambda: iter(found))
    code, printed = examine(only=['mm packages'])
    assert code == 1
    assert f'both sets are installed in {tmp_path}' in printed
    assert '-> pip uninstall -y onedl-mmengine' in printed


@pytest.mark.heavy
@needs(COMPILE_CELLS)
def test_what_is_missing_but_not_needed(examine, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, 'find_spec', lambda name: None if name == 'timm' else find_spec(name)
    )
    code, printed = examine(only=['torch.compile', 'optional packages'])
    assert code == 0
    assert 'no C++ compiler' in printed and 'apt install g++' in printed
    assert '-> pip install timm' in printed and 'ConvFormer, CAFormer' in printed


@pytest.mark.heavy
def test_a_torch_too_old_to_compile(examine, monkeypatch):
    old = torch_features.COMPILE_CELLS._replace(is_there=False)
    monkeypatch.setattr(torch_features, 'COMPILE_CELLS', old)
    code, printed = examine(only=['torch.compile'])
    assert code == 0
    assert f'compile_cells needs torch 2.12 or newer, and this is {torch.__version__}' in printed


@pytest.mark.heavy
def test_what_this_torch_lacks(examine, monkeypatch):
    lacking = tuple(
        f._replace(is_there=f is torch_features.EXPORT) for f in torch_features.OPTIONAL
    )
    monkeypatch.setattr(torch_features, 'OPTIONAL', lacking)
    code, printed = examine(only=['torch'])
    assert code == 0
    assert 'compile_cells (torch 2.12)' in printed and 'export (torch' not in printed


@pytest.mark.heavy
def test_an_error_in_a_check_is_a_finding(examine, monkeypatch):
    monkeypatch.setitem(doctor.CHECKS, 'networks', lambda: 1 / 0)
    code, printed = examine(only=['networks'])
    assert code == 1 and 'ZeroDivisionError: division by zero' in printed


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('error', 'remedy'),
    [
        (ModuleNotFoundError("No module named 'ftfy'", name='ftfy'), 'pip install ftfy'),
        (ModuleNotFoundError('no', name='skimage.io'), 'pip install scikit-image'),
        (
            ImportError('libGL.so.1: cannot open shared object file'),
            'pip uninstall -y opencv-python && pip install --force-reinstall',
        ),
    ],
)
def test_a_failed_import_has_a_remedy(examine, monkeypatch, error, remedy):
    def fails():
        raise error

    monkeypatch.setitem(doctor.CHECKS, 'segmentation', fails)
    code, printed = examine(only=['segmentation'])
    assert code == 1 and f'-> {remedy}' in printed


# A config and a checkpoint


@pytest.mark.heavy
def test_a_config_of_ours(examine):
    code, printed = examine('upernet_cpolynext_s_ade20k')
    assert code == 0
    assert 'EncoderDecoder' in printed and 'published: 50.6 mIoU' in printed
    assert '--cfg-options data_root=FOLDER' in printed


@pytest.mark.heavy
def test_a_config_that_does_not_exist(examine):
    code, printed = examine('absent')
    assert code == 1 and 'ConfigNotFoundError: there is no config absent' in printed


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'config.py'
    tiny_config(tmp_path, tmp_path).dump(path)
    return path


@pytest.mark.heavy
def test_a_checkpoint_that_fits(examine, config, tmp_path):
    path = tmp_path / 'whole.pth'
    meta = dict(dataset_meta=dict(classes=('a', 'b')))
    torch.save(segmentor_file(tiny_config('', ''), **meta), path)
    code, printed = examine(config, path)
    assert code == 0
    assert 'PolyNeXt: loaded 393 of 393 tensors' in printed
    assert 'heads: loaded' in printed and 'iter 160000' in printed and '2 classes' in printed


@pytest.mark.heavy
def test_a_checkpoint_to_start_from(examine, config, tmp_path):
    path = tmp_path / 'cpolynext_t.pt'
    torch.save(imagenet_weights(), path)
    code, printed = examine(config, path)
    assert code == 0
    assert 'cannot be evaluated' in printed and 'published: 80.2 on imagenet' in printed


@pytest.mark.heavy
def test_a_checkpoint_that_does_not_fit(examine, config, tmp_path):
    path = tmp_path / 'other.pt'
    torch.save(imagenet_weights('cpolynext_s'), path)
    code, printed = examine(config, path)
    assert code == 1
    assert 'FAIL  checkpoint' in printed and "the file is of arch 'cpolynext_s'" in printed


@pytest.mark.heavy
def test_a_checkpoint_of_another_backbone(examine, tmp_path):
    path = tmp_path / 'resnet.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.ones(1)}), path)
    code, printed = examine(ROOT / 'configs' / 'atss_resnet18_materials.py', path)
    assert code == 1 and 'does not fit' in printed
