"""The PolyNeXt backbone as users of mm see it."""

import copy
import math

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from polynext_mm.backbones.multiscale import OutNorm
from polynext_mm.compat.torch_features import COMPILE_CELLS
from polynext_mm.nn import compiling
from tests.golden import image
from tests.helpers import zipped
from tests.helpers.checkpoints import imagenet_weights
from tests.helpers.networks import build
from tests.helpers.tiny import TINY_ARCH, TWO_STAGES, randomized
from tests.marks import needs, some_slow

CELLS = sum(TINY_ARCH['depths'])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def backbone(**settings):
    """Build a tiny PolyNeXt, with weights that let every part matter."""
    return randomized(build(**settings))


def gradients(model, x) -> tuple[list, dict]:
    """Return features, and the gradient of every parameter that has one."""
    model.zero_grad()
    features = model(x)
    sum((f.float() * (i + 1)).square().mean() for i, f in enumerate(features)).backward()
    return list(features), {
        name: param.grad.clone()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def assert_equal(first, second):
    for a, b in zipped(first, second):
        assert torch.equal(a, b)


# Building


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', None])
def test_builds_under_every_default_scope(scope):
    def built():
        if scope is None:
            return MODELS.build(dict(type='PolyNeXt', arch='cpolynext_t'))
        with DefaultScope.overwrite_default_scope(scope):
            registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
            return registry.build(dict(type='PolyNeXt', arch='cpolynext_t'))

    assert built().out_channels == (48, 96, 192, 288)


@pytest.mark.parametrize(
    ('settings', 'valid'),
    [
        (
            dict(arch='cpolynext_x'),
            'cpolynext_t, cpolynext_s, cpolynext_b, cpolynext_l, apolynext_t',
        ),
        (
            dict(arch=dict(TINY_ARCH, depth=3)),
            r"unknown fields \['depth'\].*the fields are widths, depths",
        ),
        (dict(arch=dict(widths=(8, 16))), r"missing fields \['depths'"),
        (dict(arch=dict(TINY_ARCH, mixers=('conv', 'conv', 'attn', 'softmax'))), "'conv', 'attn'"),
        (dict(arch=dict(TINY_ARCH, downsampling=('sep3x3', 'pool'))), "'sep3x3', 'full3x3'"),
        (dict(arch=dict(TINY_ARCH, depths=(1, 2, 1))), 'depths needs one entry for each of the 4'),
        (dict(arch=dict(TINY_ARCH, mlp_ratios=(2, 2, 1.6, 1.75))), 'must be even'),
        (dict(arch=dict(TINY_ARCH, gate_init=(0, -0.5))), 'gate_init needs at least 4'),
        (dict(in_channels=0), 'positive integer'),
        (dict(in_channels='3'), 'positive integer'),
        (dict(out_indices=(0, 4)), r'\(0, 1, 2, 3\)'),
        (dict(out_indices=(-1,)), r'\(0, 1, 2, 3\)'),
        (dict(out_indices=(1, 0)), 'ascending'),
        (dict(out_indices=(1, 1)), 'ascending'),
        (dict(out_indices=()), 'ascending'),
        (dict(out_indices=3), r'\(0, 1, 2, 3\)'),
        (dict(out_indices=('0',)), r'\(0, 1, 2, 3\)'),
        (dict(drop_path_rate=1.5), r'\[0, 1\]'),
        (dict(drop_path_rate=-0.1), r'\[0, 1\]'),
        (dict(drop_path_rate=math.nan), r'\[0, 1\]'),
        (dict(frozen_stages=5), r'-1 \(nothing\), 0 \(the stem\), ..., 4'),
        (dict(frozen_stages=-2), '-1'),
        (dict(frozen_stages=1.0), '-1'),
        (dict(grad_clip_norm=0), 'positive or None'),
        (dict(grad_clip_norm=-5.0), 'positive or None'),
        (dict(out_norm='LN'), 'True or False'),
        (dict(with_cp='no'), 'True or False'),
        (dict(out_contiguous=1), 'out_contiguous must be True or False'),
        (dict(adapt_stem='timm'), 'adapt_stem must be True or False'),
        (dict(compile_cells=1), "True, False or 'reduce-overhead', got 1"),
        (dict(compile_cells='max'), "True, False or 'reduce-overhead', got 'max'"),
        (dict(weight_init='kaiming'), r"\('imagenet', 'trunc_normal'\), got 'kaiming'"),
        (dict(pretrained=''), 'pretrained=None'),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_the_valid_ones(settings, valid):
    with pytest.raises(ValueError, match=valid):
        build(**settings)


@pytest.mark.parametrize('option', ['drop_path', 'norm_cfg', 'out_norms'])
def test_an_unknown_option_is_an_error(option):
    with pytest.raises(TypeError, match=option):
        build(**{option: None})


@pytest.mark.parametrize(
    'arch',
    [TINY_ARCH, {k: list(v) for k, v in TINY_ARCH.items()}, dict(TINY_ARCH, paired_gates=True)],
)
def test_a_custom_arch(arch):
    model = build(arch=copy.deepcopy(arch))
    assert [len(stage.cells) for stage in model.stages] == [1, 2, 1, 1]
    assert [f.shape[1] for f in model(torch.randn(1, 3, 32, 32))] == [8, 16, 16, 24]
    assert len(model.stages[0].cells[0].gate_logits) == 5


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), [3], (1, 2), (0, 3), (2,)])
@pytest.mark.parametrize('out_norm', [True, False])
def test_any_subset_of_stages(out_indices, out_norm):
    model = backbone(out_indices=out_indices, out_norm=out_norm).eval()
    outs = model(torch.randn(2, 3, 64, 64))
    assert model.out_channels == tuple(TINY_ARCH['widths'][i] for i in out_indices)
    assert model.out_strides == tuple((4, 8, 16, 32)[i] for i in out_indices)
    assert [tuple(out.shape) for out in outs] == [
        (2, c, 64 // s, 64 // s) for c, s in zip(model.out_channels, model.out_strides)
    ]
    assert set(model.out_norms) == ({str(i) for i in out_indices} if out_norm else set())


def test_stages_do_not_depend_on_which_others_are_asked_for():
    x, whole = image((64, 64)), build(arch='cpolynext_t')
    whole.load_state_dict(imagenet_weights(), strict=False)
    some = build(arch='cpolynext_t', out_indices=(1, 2))
    some.load_state_dict(imagenet_weights(), strict=False)
    assert_equal(some(x), whole(x)[1:3])


def test_output_norms_are_channelwise_with_weight_and_bias():
    with_norm, without = backbone(), build(out_norm=False)
    without.load_state_dict(with_norm.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 96)
    for i, (normed, raw) in enumerate(zip(with_norm(x), without(x))):
        mean, var = raw.mean(1, keepdim=True), raw.var(1, keepdim=True, correction=0)
        norm = with_norm.out_norms[str(i)]
        expected = (raw - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[
            :, None, None
        ]
        torch.testing.assert_close(normed, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (57, 32), (95, 64), (64, 129)])
def test_odd_sizes_round_up(size):
    outs = backbone()(torch.randn(1, 3, *size))
    assert [tuple(out.shape[2:]) for out in outs] == [
        tuple(math.ceil(n / stride) for n in size) for stride in (4, 8, 16, 32)
    ]
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize('size', [(31, 64), (64, 16)])
def test_smaller_images_are_refused(size):
    with pytest.raises(ValueError, match=f'at least 32x32, got {size[0]}x{size[1]}'):
        build()(torch.randn(1, 3, *size))


# Half precision


@pytest.mark.parametrize('out_norm', [True, False])
def test_outputs_are_in_contiguous_memory_on_request(out_norm):
    torch.manual_seed(0)
    usual = backbone(out_norm=out_norm)
    model = backbone(out_norm=out_norm, out_contiguous=True)
    model.load_state_dict(usual.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for out, other in zipped(model(x), usual(x)):
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert out.is_contiguous() and torch.equal(out, other)


@pytest.mark.parametrize('channels', [1, 3, 4, 7])
def test_the_stem_of_a_file_is_adapted_on_request_as_by_timm(channels, tmp_path, monkeypatch):
    timm = pytest.importorskip('timm')
    log: list[str] = []
    monkeypatch.setattr('polynext_mm.backbones.multiscale.say', lambda text, **_: log.append(text))
    weights = backbone().state_dict()
    file = tmp_path / 'file.pth'
    torch.save(weights, file)
    init_cfg = dict(type='Pretrained', checkpoint=str(file))
    model = backbone(in_channels=channels, adapt_stem=True, init_cfg=init_cfg)
    model.init_weights()
    expected = timm.models.adapt_input_conv(channels, weights['stem.weight'])
    torch.testing.assert_close(model.stem.weight.data, expected)
    others = model.state_dict()
    assert all(torch.equal(others[key], weights[key]) for key in weights if 'stem' not in key)
    line = f'stem.weight adapted from 3 to {channels} channels'
    assert any(line in message for message in log) == (channels != 3)
    torch.save(others, file)  # what is of as many channels is taken as it is
    again = backbone(in_channels=channels, adapt_stem=True, init_cfg=init_cfg)
    again.init_weights()
    assert torch.equal(again.stem.weight, model.stem.weight)


class ProductTypes(TorchDispatchMode):
    """Record the dtypes of matrix products and convolutions, by operator."""

    NAMES = ('mm', 'convolution')

    def __init__(self):
        super().__init__()
        self.seen = {name: set() for name in self.NAMES}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.seen:
            self.seen[name].update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [1, 300])
def test_autocast_is_finite_and_keeps_the_stream_wide(dtype, scale):
    model = backbone()
    stream = []
    for cell in model.cells():
        cell.register_forward_hook(lambda cell, inputs, out: stream.append(out.dtype))
    with torch.autocast('cpu', dtype), ProductTypes() as products:
        outs = model(scale * torch.randn(2, 3, 64, 96))
    assert {out.dtype for out in outs} == set(stream) == {torch.float32}
    assert products.seen == {name: {dtype} for name in ProductTypes.NAMES}
    sum(out.square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    for name, param in model.named_parameters():
        assert param.grad.isfinite().all() and param.grad.dtype is torch.float32, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype):
    """The bound is 8 roundings or 3 %, on maps of at least 3x5, whose means are meaningful."""
    model = build(arch='apolynext_t', out_norm=False).eval()
    model.load_state_dict(imagenet_weights('apolynext_t'), strict=False)
    with torch.no_grad():
        exact = model(image((96, 160)))
        with torch.autocast('cpu', dtype):
            close = model(image((96, 160)))
    for a, b in zip(exact, close):
        assert (a - b).abs().mean() < min(0.03, 8 * torch.finfo(dtype).eps) * a.abs().mean()
        assert not torch.equal(a, b)


def test_a_double_backbone_stays_double():
    outs = backbone().double()(torch.randn(1, 3, 64, 64).double())
    assert all(out.dtype is torch.float64 for out in outs)
    x = torch.randn(1, 8, 4, 4).double()
    assert OutNorm(8).double()(x).dtype is torch.float64


# Freezing and checkpointing


@pytest.mark.parametrize(
    'settings',
    [
        dict(frozen_stages=4),
        dict(frozen_stages=2),
        dict(with_cp=True),
        dict(with_cp=True, frozen_stages=1, drop_path_rate=0.5),
        dict(grad_clip_norm=5.0),
    ],
)
def test_in_eval_mode_options_of_training_change_nothing(settings):
    plain, other = backbone().eval(), backbone(**settings).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_equal(plain(x), other(x))


def expected_frozen(k: int) -> set[str]:
    """Return the prefixes of frozen parameters."""
    return {
        -1: set(),
        0: {'stem'},
        1: {'stem', 'stages.0'},
        2: {'stem', 'stages.0', 'stages.1'},
        3: {'stem', 'stages.0', 'stages.1', 'stages.2'},
        4: {'stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3'},
    }[k]


@pytest.mark.parametrize('k', range(-1, 5))
def test_frozen_stages(k):
    model = backbone(frozen_stages=k, drop_path_rate=0.5).train()
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    expected = {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(prefix + '.') for prefix in expected_frozen(k))
    }
    assert frozen == expected
    assert (k < 2) == (not any('stages.1.downsample' in name for name in frozen))
    assert not any(name.startswith('out_norms') for name in frozen)
    for name, module in model.named_modules():
        inside = any(name == p or name.startswith(p + '.') for p in expected_frozen(k))
        assert not name or name in ('stages', 'out_norms') or module.training == (not inside), name
    _, grads = gradients(model, torch.randn(2, 3, 64, 64))
    assert set(grads).isdisjoint(frozen)
    assert {'out_norms.0.weight', 'out_norms.3.bias'} <= set(grads)
    assert all(not module.training for module in model.eval().modules())


def test_frozen_parts_do_not_drop_paths():
    model = backbone(frozen_stages=4, drop_path_rate=0.9, out_norm=False).train()
    x = torch.randn(2, 3, 64, 64)
    assert_equal(model(x), model(x))


@pytest.mark.parametrize('settings', [dict(), dict(frozen_stages=1), dict(grad_clip_norm=0.01)])
def test_checkpointing_changes_nothing_in_training(settings):
    plain = backbone(drop_path_rate=0.5, **settings).train()
    saving = backbone(drop_path_rate=0.5, with_cp=True, **settings).train()
    x = torch.randn(3, 3, 64, 64)
    runs = []
    for model in (plain, saving):
        torch.manual_seed(3)
        runs.append(gradients(model, x))
    assert_equal(*[run[0] for run in runs])
    assert runs[0][1].keys() == runs[1][1].keys()
    assert_equal(*[run[1].values() for run in runs])


def test_checkpointing_computes_cells_again():
    model = backbone(with_cp=True).train()
    calls = []
    for cell in model.cells():
        cell.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, torch.randn(1, 3, 32, 32))
    assert len(calls) == 2 * CELLS


# Initialization


def branch_at_the_start(weight_init: dict, stage: int) -> tuple[float, float]:
    """Return the rms of a PolyConv branch at unit input, and that of its first gradient."""
    mixer = build(arch='cpolynext_t', **weight_init).stages[stage].cells[0].stacks[0].mixer
    x = torch.randn(2, 16, 16, mixer.proj_in.in_features)
    branch = mixer(x) - x
    (branch * torch.randn_like(branch)).sum().backward()
    grad = mixer.proj_in.weight.grad / (2 * 16 * 16) ** 0.5  # an average position's
    return tuple(t.square().mean().sqrt().item() for t in (branch, grad))


@pytest.mark.parametrize('stage', range(4))
def test_training_from_scratch_starts_alive(stage):
    branch, grad = branch_at_the_start({}, stage)
    assert 0.5 < branch < 2 and 0.5 < grad < 2
    dead_branch, dead_grad = branch_at_the_start(dict(weight_init='trunc_normal'), stage)
    assert dead_branch < 0.01 * branch and dead_grad < 0.02 * grad


@pytest.mark.parametrize('weight_init', ['imagenet', 'trunc_normal'])
def test_values_of_the_initializations(weight_init):
    model = build(arch='apolynext_t', weight_init=weight_init)
    model.init_weights()  # without an init_cfg it changes nothing
    conv, attn = (model.stages[i].cells[0].stacks[0] for i in (0, 2))
    convs = (conv.mixer.proj_in, conv.mixer.coarse_conv, conv.mlp.proj_out)
    other = (attn.mixer.proj_in, model.stem)
    for layers, gain in ((convs, 2), (other, 1 / 3)):  # Kaiming normal, PyTorch's default
        for layer in layers:
            fan_in = layer.weight[0].numel()
            expected = 0.02 if weight_init == 'trunc_normal' else (gain / fan_in) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert conv.mixer.norm.weight.eq(1).all() and model.out_norms['0'].bias.eq(0).all()


# Stochastic depth


def test_drop_path_rates_rise_linearly():
    rates = [cell.drop_path_rate for cell in build(drop_path_rate=0.4).cells()]
    assert rates == pytest.approx([0.4 * i / (CELLS - 1) for i in range(CELLS)])


def test_drop_path_drops_whole_samples_in_training_alone():
    x = torch.randn(1, 3, 64, 64).repeat(8, 1, 1, 1)
    model = backbone(drop_path_rate=0.5, out_norm=False)
    plain = backbone(out_norm=False)
    for a, b in zip(model.eval()(x), plain(x)):
        assert torch.equal(a, b)
    dropped = model.train()(x)[-1]
    assert len({round(sample.sum().item(), 3) for sample in dropped}) > 1
    assert_equal(*[[plain.train()(x)[-1]] for _ in range(2)])


# Layer-wise depth, compilation


@pytest.mark.parametrize(
    ('name', 'depth'),
    [
        ('stem.weight', 0),
        ('stages.0.cells.0.norm.weight', 1),
        ('stages.1.downsample.1.conv.weight', 2),
        ('stages.1.cells.0.scale0', 2),
        ('stages.1.cells.1.scale0', 3),
        ('stages.3.cells.0.gate_logits', 5),
        ('out_norms.0.weight', 6),
    ],
)
def test_layer_depth(name, depth):
    assert build().get_layer_depth(f'backbone.{name}') == (depth, CELLS + 2)


@needs(COMPILE_CELLS)
@pytest.mark.parametrize('by_argument', [True, False])
def test_compiled_cells_keep_their_names(monkeypatch, by_argument):
    monkeypatch.setattr('shutil.which', lambda name: f'/usr/bin/{name}')
    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda module, **options: compiled.append(module))
    model = build(compile_cells=True) if by_argument else build().compile_cells()
    assert compiled == [stack for cell in model.cells() for stack in cell.stacks]
    assert list(model.state_dict()) == list(build().state_dict())


@needs(COMPILE_CELLS)
def test_cuda_graphs_of_compiled_cells(monkeypatch):
    """Every forward pass begins a step for them, and every stack is compiled for them."""
    monkeypatch.setattr('shutil.which', lambda name: f'/usr/bin/{name}')
    modes, steps = [], []
    monkeypatch.setattr(nn.Module, 'compile', lambda module, **options: modes.append(options))
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: steps.append(1))
    x = torch.randn(1, 3, 32, 32)
    build(compile_cells=True)(x)
    assert not steps and {options['mode'] for options in modes} == {'default'}
    modes.clear()
    model = build(compile_cells='reduce-overhead')
    stacks = sum(len(cell.stacks) for cell in model.cells())
    assert modes == [dict(dynamic=True, mode='reduce-overhead')] * stacks
    for _ in range(2):
        model(x)
    assert len(steps) == 2
    with pytest.raises(ValueError, match="'default', 'reduce-overhead'"):
        model.compile_cells('fast')


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a compiler; return a function that counts the graphs."""
    if not COMPILE_CELLS.is_there:
        pytest.skip(COMPILE_CELLS.what_is_missing())
    monkeypatch.setattr('shutil.which', lambda name: f'/usr/bin/{name}')
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        'compile',
        lambda module, dynamic, mode: compile_module(
            module, backend='aot_eager', fullgraph=True, dynamic=dynamic
        ),
    )
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters['stats']['unique_graphs']
    torch._dynamo.reset()


def test_compiling_with_an_old_torch_is_an_error(monkeypatch):
    monkeypatch.setattr(compiling, 'COMPILE_CELLS', COMPILE_CELLS._replace(is_there=False))
    with pytest.raises(RuntimeError, match='needs torch 2.12 or newer, and this is'):
        build(compile_cells=True)


def evaluated_and_trained(compile_cells, dtype, autocast, arch=TINY_ARCH):
    """Features in evaluation, features in training, and all gradients as one vector."""
    model = backbone(arch=arch, compile_cells=compile_cells, drop_path_rate=0.3).to(dtype)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 96).to(dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            evaluated = model.eval()(x)
        features = model.train()(x)
    sum(f.square().mean() for f in features).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [*evaluated, *features, gradient]


@pytest.mark.heavy
def test_compiled_cells_compute_the_same(graphs):
    """In both directions, with paths dropped."""
    expected, actual = (
        evaluated_and_trained(compiled, torch.float64, autocast=False, arch=TWO_STAGES)
        for compiled in (False, True)
    )
    assert graphs()
    for a, b in zipped(actual, expected):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.slow
def test_compiled_cells_are_as_exact_under_autocast(graphs):
    """Compiled code rounds to bfloat16 in other places than kernels do, and no more often."""
    exact = evaluated_and_trained(False, torch.float32, autocast=False)
    eager = evaluated_and_trained(False, torch.float32, autocast=True)
    compiled = evaluated_and_trained(True, torch.float32, autocast=True)
    assert graphs()
    for a, b, c in zipped(compiled, eager, exact):
        assert (a - c).norm() <= 1.2 * (b - c).norm() <= 0.06 * c.norm()


@pytest.mark.heavy
@pytest.mark.parametrize('train', some_slow([False, True], [True]))
def test_equal_stacks_share_code_for_any_size(train, graphs):
    arch = dict(TWO_STAGES, depths=(2, 1), stacks=(2, 1))
    model = backbone(arch=arch, compile_cells=True, drop_path_rate=0.3 * train).train(train)

    def run(*size):
        with torch.set_grad_enabled(train):
            features = model(torch.randn(2, 3, *size))
        if train:
            sum(f.mean() for f in features).backward()

    run(64, 96)
    # one per stage, and in training that of the first cell, which drops no path
    assert graphs() == 2 + train
    run(96, 160)
    once_more = graphs()
    assert once_more <= 4 + train
    for size in ((128, 64), (160, 224), (192, 96)):
        run(*size)
    assert graphs() == once_more


@needs(COMPILE_CELLS)
def test_compilation_without_a_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(
        RuntimeError, match=r'needs a C\+\+ compiler and there is no g\+\+'
    ) as caught:
        build(compile_cells=True)
    assert '\n' not in str(caught.value)


# Other


def test_deep_copies_load_for_themselves():
    """As hooks that average weights copy models."""
    model = build(arch='cpolynext_t')
    twin = copy.deepcopy(model)
    twin.load_state_dict(imagenet_weights(), strict=False)
    assert torch.equal(twin.stem.weight, imagenet_weights()['stem.weight'])
    assert not torch.equal(model.stem.weight, twin.stem.weight)


def test_init_cfg_of_other_kinds_is_applied():
    model = build(init_cfg=[dict(type='Constant', layer='Linear', val=0.25)])
    model.init_weights()
    assert (model.stages[0].cells[0].stacks[0].mlp.proj_in.weight == 0.25).all()


def test_the_callers_settings_stay_as_they_are():
    arch, init_cfg = copy.deepcopy(TINY_ARCH), [dict(type='Constant', layer='Linear', val=0.25)]
    out_indices = [1, 3]
    model = build(arch=arch, init_cfg=init_cfg, out_indices=out_indices)
    model.init_weights()
    assert arch == TINY_ARCH and out_indices == [1, 3]
    assert init_cfg == [dict(type='Constant', layer='Linear', val=0.25)]
