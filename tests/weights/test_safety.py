"""Nothing in PolyNeXt's files is executed; other people's load as without this package."""

import textwrap

import pytest
import torch
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint

from helpers import ARCH, build, imagenet_weights, python, sample_as_ade20k, tiny_config
from polynext_mm import weights
from polynext_mm.weights import CheckpointError

pytestmark = pytest.mark.usefixtures('quick_configs')
EXECUTED = 'executed by the file'


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return eval, (f'open({self.trace!r}, "w").write({EXECUTED!r})',)


class Setting:
    """Somebody's own class, harmless and not known to be."""

    def __init__(self):
        self.value = 3


@pytest.fixture
def trace(tmp_path):
    return tmp_path / 'trace'


def by_init_cfg(path, config):
    build(arch=ARCH, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()


def by_load_checkpoint(path, config):
    load_checkpoint(build(arch=ARCH), path)


def by_init_model(path, config):
    from mmseg.apis import init_model

    init_model(config, path, device='cpu')


def by_load_from(path, config):
    config.load_from = path
    Runner.from_cfg(config).load_or_resume()


def by_resuming(path, config):
    config.load_from, config.resume = path, True
    Runner.from_cfg(config).train()


def by_read(path, config):
    weights.read(path)


@pytest.mark.parametrize(
    ('way', 'zipped'),
    [
        (by_init_cfg, True),
        (by_load_checkpoint, True),
        (by_load_checkpoint, False),
        (by_init_model, True),
        (by_load_from, True),
        (by_resuming, True),
        (by_read, True),
        (by_read, False),
    ],
)
def test_a_file_that_needs_code_is_refused_by_name_and_not_executed(tmp_path, trace, way, zipped):
    config = tiny_config(sample_as_ade20k(tmp_path), tmp_path / 'work')
    path = str(tmp_path / 'segmentor.pth')
    weight = {'backbone._orig_mod.cells.0.skip_weight': torch.ones(6)}
    torch.save(
        dict(meta=dict(config=''), state_dict=weight, extra=Evil(trace)),
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match='eval') as caught:
        way(path, config)
    assert not trace.exists()
    assert f'unsafe:{path}' in str(caught.value)


@pytest.mark.parametrize(
    'content',
    [
        lambda evil: dict(imagenet_weights(), evil=evil),
        lambda evil: dict(state_dict=dict(imagenet_weights(), evil=evil)),
        lambda evil: dict(ema=dict(deeper=imagenet_weights()), args=evil),
        lambda evil: [imagenet_weights(), evil],
        lambda evil: {evil: 0, 'model': imagenet_weights()},
    ],
    ids=['among weights', 'state_dict', 'deep', 'list', 'key'],
)
def test_wherever_the_code_is(tmp_path, trace, content):
    path = str(tmp_path / 'weights.pt')
    torch.save(content(Evil(trace)), path)
    with pytest.raises(CheckpointError, match='eval'):
        load_checkpoint(build(arch=ARCH), path)
    assert not trace.exists()


def test_getattr_reaches_nothing_but_history_buffers(tmp_path, trace):
    class Reach:
        def __reduce__(self):
            return getattr, (dict, 'fromkeys')

    path = str(tmp_path / 'weights.pt')
    torch.save(dict(imagenet_weights(), reach=Reach()), path)
    with pytest.raises(CheckpointError):
        weights.read(path)


def load(path, backbone):
    weights.load(backbone, path)


def init_cfg(path, backbone):
    backbone.init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone.init_weights()


@pytest.mark.parametrize('way', [init_cfg, load])
def test_unsafe_reads_the_way_of_mmengine(tmp_path, trace, way):
    path = tmp_path / 'weights.pt'
    torch.save(dict(state_dict=imagenet_weights(), extra=Evil(trace), setting=Setting()), path)
    backbone = build(arch=ARCH)
    way(f'unsafe:{path}', backbone)
    assert trace.read_text() == EXECUTED
    assert torch.equal(backbone.stem.weight, imagenet_weights()['stem.weight'])


def test_within_safe_reading_no_file_at_all_is_executed(tmp_path, trace):
    path = str(tmp_path / 'somebody.pth')
    torch.save(dict(state_dict={'conv1.weight': torch.ones(2)}, extra=Evil(trace)), path)
    with weights.safe_reading(), pytest.raises(CheckpointError, match='eval'):
        CheckpointLoader.load_checkpoint(path)
    assert not trace.exists()


# Other people's checkpoints, with this package imported and without

OTHERS = textwrap.dedent("""
    import pickle
    import sys
    import torch
    if sys.argv[2] == 'with':
        import polynext_mm
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader, load_checkpoint


    class Own:
        value = 3


    sys.modules['__main__'].Own = Own
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    if sys.argv[2] == 'make':
        meta = dict(own=Own(), config='a = 1')
        content = dict(meta=meta, state_dict=model.state_dict(), extra={1: 2})
        torch.save(content, sys.argv[1])
        sys.exit()
    try:
        content = load_checkpoint(model, sys.argv[1])
        print('READ', sorted(content), content['meta']['own'].value, content['meta']['config'],
              sorted(content['state_dict']), content['extra'], model[0].weight.tolist())
    except pickle.UnpicklingError as error:  # upstream's mmengine refuses what the fork reads
        print('READ', str(error).splitlines()[0])
    torch.save([1, 2], sys.argv[1] + '.list')
    print('READ', CheckpointLoader.load_checkpoint(sys.argv[1] + '.list'))
    for wrong in ('absent.pth', sys.argv[0]):
        try:
            CheckpointLoader.load_checkpoint(wrong)
        except Exception as error:
            print('READ', type(error).__name__, error)
""")


def test_other_peoples_files_load_as_without_the_import(tmp_path):
    script, file = tmp_path / 'script.py', tmp_path / 'others.pth'
    script.write_text(OTHERS)
    python(script, file, 'make')
    printed = [
        [
            line
            for line in python(script, file, how, cwd=tmp_path).splitlines()
            if line.startswith('READ')
        ]
        for how in ('with', 'without')
    ]
    assert len(printed[0]) == 4
    assert '3 a = 1' in printed[0][0] or 'Weights only load failed' in printed[0][0]
    assert printed[0] == printed[1]
