"""When the stand-in for ``mmcv._ext`` takes its place; each case in its own interpreter."""

import textwrap

import pytest

from tests.helpers.programs import python

pytestmark = pytest.mark.heavy

pytest.importorskip('mmcv')


def run(program, *arguments):
    """Run a program in a fresh interpreter and return what it printed."""
    return python('-c', textwrap.dedent(program), *arguments)


@pytest.fixture
def extension(tmp_path):
    """Return a function that writes a ``mmcv._ext`` and returns the folder it is in."""

    def write(source):
        (tmp_path / '_ext.py').write_text(source)
        return tmp_path

    return write


#: A broken extension, so that the stand-in is installed whether or not mmcv has a real one.
BROKEN = "raise ImportError('undefined symbol:\\n_ZN2at')"

PUT_FIRST = """
    import sys
    import mmcv
    mmcv.__path__.insert(0, sys.argv[1])
    from polynext_mm.compat import install_mmcv_ops
    install_mmcv_ops()
"""


def test_a_real_extension_stays(extension):
    folder = extension("nms = 'compiled'")
    run(
        PUT_FIRST
        + """
    assert sys.modules['mmcv._ext'].nms == 'compiled'
    assert sys.modules['mmcv._ext'].__file__.startswith(sys.argv[1])
    assert not hasattr(sys.modules['mmcv._ext'], 'softnms')
    """,
        folder,
    )


def test_the_stand_in_is_a_module_like_others_and_says_why_at_the_first_operator(extension):
    printed = run(
        PUT_FIRST
        + """
    import importlib.util
    import pkgutil
    import mmcv._ext as first
    from mmcv.utils import ext_loader

    install_mmcv_ops()
    assert sys.modules['mmcv._ext'] is first is mmcv._ext
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec.name == first.__name__ == 'mmcv._ext'
    assert spec.origin == first.__file__ and first.__file__.endswith('mmcv_ext.py')
    if hasattr(pkgutil, 'find_loader'):
        assert ext_loader.check_ops_exist()
    import torch
    from mmcv import ops
    print('imported')
    for _ in range(2):
        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2))
    """,
        extension(BROKEN),
    )
    before, after = printed.split('imported\n')
    assert before == ''
    assert len(after.splitlines()) == 1
    assert '(ImportError: undefined symbol: _ZN2at); polynext_mm runs them on' in after


def test_installing_imports_neither_the_operators_nor_torchvision(extension):
    run(
        """
    import importlib.util
    import sys
    import types
    import mmcv
    mmcv.__path__.insert(0, sys.argv[1])
    package = types.ModuleType('polynext_mm')  # without what else the package imports
    package.__path__ = importlib.util.find_spec('polynext_mm').submodule_search_locations
    sys.modules['polynext_mm'] = package
    from polynext_mm.compat import install_mmcv_ops
    install_mmcv_ops()
    assert 'mmcv._ext' in sys.modules
    assert 'mmcv.ops' not in sys.modules and 'torchvision' not in sys.modules
    """,
        extension(BROKEN),
    )


def test_an_mmcv_that_is_missing_or_lacks_something_itself_is_not_passed_over():
    printed = run("""
    import sys
    from polynext_mm.compat import check_stack, install_mmcv_ops

    for hidden in ('cv2', 'mmcv'):
        sys.modules[hidden] = None
        try:
            install_mmcv_ops()
            check_stack()
        except ImportError as error:
            print(error.name, error)
        assert 'mmcv._ext' not in sys.modules
    """)
    cv2, mmcv = printed.splitlines()
    assert cv2.startswith('cv2 ')
    assert mmcv.startswith('mmcv polynext_mm needs mmcv, which is not installed: run `pip ')


def test_modules_imported_too_early_get_their_operators(extension):
    pytest.importorskip('mmdet')
    printed = run(
        """
    import sys
    import mmcv
    mmcv.__path__.insert(0, sys.argv[1])
    try:
        from mmdet.structures.mask import structures
    except ImportError:
        print('unguarded')
        sys.exit()
    assert structures.roi_align.__module__ == structures.__name__
    from polynext_mm.compat import install_mmcv_ops
    install_mmcv_ops()
    import numpy as np
    masks = structures.BitmapMasks(np.ones((1, 8, 8), dtype=np.uint8), 8, 8)
    cut = masks.crop_and_resize(np.array([[0.0, 0, 8, 8]]), (4, 4), np.array([0]))
    print(cut.masks.sum())
    """,
        extension(BROKEN),
    )
    if printed == 'unguarded\n':
        pytest.skip('this mmdet cannot be imported too early')
    assert printed.splitlines()[-1] == '16'
