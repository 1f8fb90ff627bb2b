"""The doors of the package: what importing it needs, does and costs; its version."""

import sys
import textwrap

import pytest

import polynext_mm
from polynext_mm.commands import main
from tests.helpers.programs import MM_PACKAGES, python, python_without
from tests.helpers.tiny import TINY_ARCH

# what people have besides torch, and a network does not need
OTHERS = ('cv2', 'matplotlib', 'numpy', 'PIL', 'safetensors', 'scipy', 'timm', 'torchvision')


@pytest.mark.heavy
def test_the_networks_need_torch_alone():
    hidden = {*MM_PACKAGES, *OTHERS}
    program = f"""
        import torch
        import polynext_mm.nn
        from polynext_mm.nn.plain import PlainPolyNeXt

        network = polynext_mm.nn.PolyNeXtClassifier(polynext_mm.nn.get_arch({TINY_ARCH}))
        print(tuple(network(torch.randn(2, 3, 32, 32)).shape))
        print({hidden} & set(sys.modules))
    """
    assert python_without(hidden, program).splitlines() == ['(2, 1000)', 'set()']


CHECK_REGISTERED = """
import sys
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import CheckpointLoader
assert MODELS.get('PolyNeXt').__module__ == 'polynext_mm.backbones.polynext'
assert MODELS.get('MetaFormer')
assert HOOKS.get('CheckpointGuardHook') and HOOKS.get('TrainingCheckHook')
assert OPTIM_WRAPPERS.get('AutocastOptimWrapper')
assert OPTIM_WRAPPER_CONSTRUCTORS.get('PolyNeXtOptimWrapperConstructor')
assert {'polynext://', 'timm://', 'unsafe:'} <= set(CheckpointLoader._schemes)
assert 'mmcv._ext' in sys.modules
"""


@pytest.mark.heavy
def test_networks_and_weights_do_not_import_mm_and_mm_finds_all_registered():
    program = f"""
        import sys
        import polynext_mm.nn
        import polynext_mm.weights
        assert not {set(MM_PACKAGES)} & set(sys.modules)
        import mmengine
    """
    python('-c', textwrap.dedent(program) + CHECK_REGISTERED)


@pytest.mark.heavy
@pytest.mark.parametrize(
    'program',
    [
        'import polynext_mm.deployment',
        'from polynext_mm.engine import launch',
        'import polynext_mm, mmcv.ops',
    ],
)
def test_all_is_registered_whatever_is_imported_first(program):
    python('-c', program + CHECK_REGISTERED)


@pytest.mark.heavy
def test_without_mm_the_first_use_of_it_says_what_to_install():
    program = """
        import importlib
        import polynext_mm

        for use in (
            lambda: polynext_mm.PolyNeXt,
            lambda: polynext_mm.engine,
            lambda: importlib.import_module('polynext_mm.backbones'),
            lambda: importlib.import_module('polynext_mm.engine.launch'),
            lambda: importlib.import_module('polynext_mm.engine.checkpoints'),
        ):
            try:
                use()
            except ImportError as error:
                print(error.name, error)
    """
    lines = python_without(MM_PACKAGES, program).splitlines()
    assert len(lines) == 5 and len(set(lines)) == 1
    assert lines[0].startswith('mmengine polynext_mm needs mmengine, which is not installed: run ')


@pytest.mark.heavy
def test_a_failure_of_ours_leaves_mmengine_to_others():
    """Such as an operator that this torch lacks: said once, and again where it is asked for."""
    program = """
        import sys
        import polynext_mm
        sys.modules['polynext_mm.backbones'] = None
        import mmengine
        import mmengine.registry
        print(mmengine.registry.MODELS.get('PolyNeXt'))
        try:
            polynext_mm.engine
        except ImportError as error:
            print(error.name)
    """
    said, *printed = python('-c', textwrap.dedent(program)).splitlines()
    assert said.startswith('polynext_mm could not be registered with mmengine')
    assert '`polynext-mm doctor`' in said and 'polynext_mm.backbones' in said
    assert printed[0] == 'None' and printed[1].startswith('polynext_mm.backbones')


def test_widths_follow_the_arch():
    assert polynext_mm.widths('apolynext_s') == [72, 144, 288, 432]
    assert polynext_mm.widths(TINY_ARCH) == list(TINY_ARCH['widths'])
    with pytest.raises(ValueError, match='unknown arch .*cpolynext_t'):
        polynext_mm.widths('cpolynext_xl')


def test_attributes():
    assert polynext_mm.PolyNeXt is polynext_mm.backbones.PolyNeXt
    assert {'PolyNeXt', 'MetaFormer', 'nn', 'weights', 'engine', '__version__'} <= set(
        dir(polynext_mm)
    )
    assert not hasattr(polynext_mm, 'nonsense')


def test_run_checks_the_stack_before_the_script(tmp_path, monkeypatch):
    script = tmp_path / 'script.py'
    script.write_text('raise SystemExit')
    monkeypatch.setattr(sys, 'argv', ['polynext_mm', 'run', str(script)])
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(SystemExit, match='polynext_mm needs mmcv'):
        main()
