"""Networks with norm='bn': the release's numbers, other sizes, training, what fusing leaves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from polynext_mm.nn import ARCHS, PolyNeXt, PolyNeXtClassifier, get_arch, plain_ops
from polynext_mm.weights.names import translate, translate_back
from tests import golden
from tests.helpers import zipped
from tests.helpers.networks import build
from tests.helpers.tiny import TINY_ARCH, TWO_STAGES

# attention that is not divided by its own row sums multiplies the roundings of float32: the plain
# formulation is 2.7e-4 off in the last stage of APolyNeXt-T
TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-9}

CONV_ONLY = dict(TINY_ARCH, mixers=('conv',) * 4)


@pytest.fixture(scope='module', params=golden.POLYNOMIAL_NETWORKS)
def network(request):
    return golden.Golden(request.param), request.param.removesuffix('_bn')


def classifier(numbers, name):
    model = PolyNeXtClassifier(name, norm='bn')
    model.load_state_dict(translate(numbers.state_dict(), model.arch), strict=True)
    return model.eval()


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_outputs_are_the_releases(network, dtype):
    numbers, name = network
    model = classifier(numbers, name).to(dtype)
    assert model.norm_size == (64, 64)
    for size, case in numbers.cases.items():
        with torch.no_grad():
            features = list(model.forward_stages(golden.image(size, case['batch']).to(dtype)))
        for stage, feature in enumerate(features):
            index, value, absmean = numbers.values(size, stage)
            assert list(feature.shape) == case['shapes'][stage]
            assert (feature.reshape(-1)[index] - value).abs().max() < TOLERANCE[dtype] * absmean


def test_names_and_shapes_are_the_releases_both_ways(network):
    numbers, name = network
    theirs = numbers.state_dict()
    back = translate_back(classifier(numbers, name).state_dict(), PolyNeXtClassifier(name).arch)
    assert set(theirs) - set(back) == {'head.2.p'}
    for key, value in back.items():
        assert value.shape == theirs[key].shape, key
        assert torch.equal(value.double(), theirs[key].double()), key


# Other sizes than that of the norms


def tiny(size=(64, 64), batch=2, arch=TINY_ARCH, gates=0.0, **settings):
    """A network whose running statistics are those of one batch, in float64, and that batch.

    On other images the values grow as those of polynomials of a high degree do; ``gates`` well
    below 0 keep them finite.
    """
    torch.manual_seed(0)
    model = PolyNeXt(arch, norm='bn', norm_size=size, **settings).double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim < 4:
                param.add_(torch.randn(param.shape, generator=generator) / 10)
        for cell in model.cells():
            cell.gate_logits += gates
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        images = golden.image(size, batch).double()
        model(images)
        for name, buffer in model.named_buffers():
            if buffer.ndim:
                buffer.copy_((buffer - 0.9 * before[name]) / 0.1)
    return model.eval(), images


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (95, 64), (64, 129)])
def test_any_size_of_image(size):
    model, _ = tiny(gates=-4.0)
    with torch.no_grad():
        features = model(golden.image(size, batch=3).double())
    for feature, stride in zip(features, model.arch.strides):
        assert feature.shape[2:] == tuple(math.ceil(side / stride) for side in size)
        assert feature.isfinite().all()
    assert model.norm_size == (64, 64)


def resized(state, size, arch):
    """The state dict at another size of image, by what the docs say."""
    other = {}
    for name, value in state.items():
        if name.endswith(('position_weight', 'running_mean', 'running_var', 'running_sum')) or (
            name.endswith('row_norm.weight')
        ):
            stride = arch.strides[int(name.split('.')[1])]
            target = [math.ceil(side / stride) for side in size]
            tokens = value.shape[-1] * value.shape[-2]
            maps = value.reshape(1, -1, *value.shape[-2:])
            maps = F.interpolate(maps, target, mode='bilinear', align_corners=False)
            value = maps.reshape(*value.shape[:-2], *target)
            if name.endswith('running_sum'):
                value = value * target[0] * target[1] / tokens
        other[name] = value
    return other


@pytest.mark.parametrize('size', [(96, 80), (33, 47)])
def test_weights_and_statistics_are_resized_bilinearly_and_row_sums_by_tokens(size):
    model, _ = tiny(gates=-2.0)
    other = PolyNeXt(TINY_ARCH, norm='bn').double().eval()
    other.load_state_dict(resized(model.state_dict(), size, model.arch))
    assert [math.ceil(side / 4) for side in other.norm_size] == [math.ceil(n / 4) for n in size]
    images = golden.image(size).double()
    with torch.no_grad():
        for actual, expected in zipped(model(images), other(images)):
            torch.testing.assert_close(actual, expected)


def test_what_is_resized_is_kept_for_each_size_until_it_changes(monkeypatch):
    model, _ = tiny()
    small, large = golden.image((32, 32)).double(), golden.image((96, 96)).double()
    calls = []
    interpolate = F.interpolate
    monkeypatch.setattr(F, 'interpolate', lambda *a, **k: calls.append(1) or interpolate(*a, **k))
    with torch.no_grad():
        model(small), model(large)
        assert calls
        calls.clear()
        before = model(small)[-1]
        model(large)
        assert not calls
        model.cells()[-1].norm.position_weight.mul_(2)
        assert not torch.equal(model(small)[-1], before)
        assert len(calls) == 3  # position_weight and both statistics of that norm
    model(small)[-1].sum().backward()  # through the resized weights
    assert all(param.grad.abs().max() > 0 for param in model.parameters() if param.ndim == 2)


def test_sizes_are_224_unless_told():
    with torch.device('meta'):
        model = PolyNeXt(TINY_ARCH, norm='bn')
        assert model.norm_size == (224, 224)
        assert PolyNeXt(TINY_ARCH, norm='bn', norm_size=[65, 90]).norm_size == (65, 90)
        assert PolyNeXt(TINY_ARCH).norm_size is None
        model.set_norm_size((512, 256))
    assert model.norm_size == (512, 256)
    assert model.cells()[-1].norm.running_mean.shape == (16, 8)
    assert model.cells()[-1].stacks[0].mixer.row_norm.weight.shape == (1, 16, 8)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(norm='BN'), r"norm must be one of \('ln', 'bn'\), got 'BN'"),
        (dict(norm='bn', norm_size=0), 'norm_size must be a positive integer or two'),
        (dict(norm='bn', norm_size=(64, 64, 64)), 'norm_size'),
        (dict(norm='bn', norm_size='64'), 'norm_size'),
        (dict(norm='bn', sync_norm=1), 'sync_norm must be True or False'),
        (dict(norm_size=64), "norm_size and sync_norm are for norm='bn'"),
        (dict(sync_norm=True), "norm_size and sync_norm are for norm='bn'"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolyNeXt(TINY_ARCH, **settings)


def test_sizes_are_refused_where_norms_have_none():
    model = PolyNeXt(TINY_ARCH)
    for change in (model.set_norm_size, model.fuse):
        with pytest.raises(ValueError, match="norm='bn'"):
            change(64)


# Training


def step(model, images):
    model.zero_grad()
    features = model(images)
    golden.loss(features, images.shape[2:]).backward()
    return [*features, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_close(actual, expected, tolerance=1e-11):
    for a, b in zipped(actual, expected):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


def test_the_first_crop_of_a_training_becomes_the_size_once(caplog):
    caplog.set_level('INFO')
    model, _ = tiny()
    fresh = PolyNeXt(TINY_ARCH, norm='bn', norm_size=(64, 64)).double()
    fresh.load_state_dict(model.state_dict())
    ids = [id(param) for param in fresh.parameters()]
    optimizer = torch.optim.AdamW(fresh.parameters())
    for size in ((96, 64), (64, 64), (96, 64)):
        step(fresh.train(), golden.image(size, batch=2).double())
        optimizer.step()
        assert fresh.norm_size == (96, 64)
    assert ids == [id(param) for param in fresh.parameters()]
    (record,) = caplog.records
    assert '64x64, are resized to the 96x64 of this training' in record.message


def test_the_size_stays_where_it_fits_or_is_to_be_kept(caplog):
    caplog.set_level('INFO')
    model = PolyNeXt(TINY_ARCH, norm='bn', norm_size=62).train()
    model(golden.image((64, 64)))
    kept = PolyNeXt(TINY_ARCH, norm='bn', norm_size=64).train()
    kept.keep_norm_size()
    kept(golden.image((96, 64)))
    assert (model.norm_size, kept.norm_size) == ((62, 62), (64, 64))
    assert not caplog.records
    assert not torch.equal(kept.cells()[0].norm.running_mean, torch.zeros(16, 16))


@pytest.mark.parametrize('plain', [False, True])
def test_checkpointed_cells_track_statistics_once(plain):
    model, images = tiny(drop_path_rate=0.3)
    saving = PolyNeXt(TINY_ARCH, norm='bn', norm_size=64, with_cp=True, drop_path_rate=0.3)
    saving.double().load_state_dict(model.state_dict())
    results = []
    for network in (model, saving):
        torch.manual_seed(0)
        with plain_ops(plain):
            results.append(step(network.train(), images + 1))
    assert_close(*results)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_norms_and_the_stream_wide(dtype):
    model, images = tiny()
    exact = step(model.train(), images)
    half = PolyNeXt(TINY_ARCH, norm='bn', norm_size=64).train()
    half.load_state_dict({k: v.float() for k, v in tiny()[0].state_dict().items()})
    with torch.autocast('cpu', dtype):
        features = half(images.float())
    golden.loss(features, (64, 64)).backward()
    assert {f.dtype for f in features} == {torch.float32}
    for actual, expected in zip(features, exact):
        assert (actual - expected).norm() < 20 * torch.finfo(dtype).eps * expected.norm()
    for name, param in half.named_parameters():
        assert param.grad.isfinite().all() and param.grad.dtype is torch.float32, name
    for name, buffer in half.named_buffers():
        assert buffer.isfinite().all() and buffer.dtype is not dtype, name


@pytest.mark.slow
def test_training_and_inference_compile_to_one_graph():
    model, images = tiny(arch=TWO_STAGES, gates=-3.0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for size in ((64, 64), (96, 64)):
            image = golden.image(size).double()
            assert_close(compiled(image), model(image))
    model.train(), twin.train()
    expected = step(model, images)
    features = compiled(images)
    golden.loss(features, (64, 64)).backward()
    actual = [*features, *(p.grad for p in twin.parameters()), *twin.buffers()]
    assert_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_cells_compute_the_same():
    model, images = tiny(arch=TWO_STAGES, gates=-3.0)
    twin = build(arch=TWO_STAGES, norm='bn', norm_size=64, compile_cells=True, out_norm=False)
    twin.double().load_state_dict(model.state_dict())
    with torch.no_grad():
        for size in ((64, 64), (96, 64)):
            image = golden.image(size).double()
            assert_close(twin.eval()(image), model(image))
    assert_close(step(twin.train(), images), step(model.train(), images))
    torch._dynamo.reset()


# Fusing and degree


@pytest.mark.parametrize('at', [None, (96, 80)])
@pytest.mark.parametrize('arch', [CONV_ONLY, TINY_ARCH], ids=['conv', 'both'])
def test_a_fused_network_computes_the_same_at_every_size(arch, at):
    model, _ = tiny((32, 32), arch=arch, gates=-3.0)
    with torch.no_grad():
        images = [golden.image(size).double() for size in ((32, 32), (96, 80), (64, 64))]
        before = [model(image) for image in images]
        model.fuse(at)
        for _ in range(2):
            for image, expected in zip(images, before):
                assert_close(model(image), expected, 1e-9)
            model.fuse()
    assert not any('gate' in name or 'scale_logit' in name for name in model.state_dict())


@pytest.mark.parametrize(
    ('name', 'degrees'),
    [
        ('cpolynext_t', (2**12, 2**24, 2**60, 2**72)),
        ('apolynext_t', (2**12, 2**24, 2**24 * 18**18, 2**24 * 18**24)),
        ('cpolynext_lr', (2**12, 2**30, 2**48)),
    ],
)
def test_degree_of_the_polynomial(name, degrees):
    assert ARCHS[name].degrees == degrees
    assert ARCHS[name].degree == degrees[-1]


@pytest.mark.parametrize('arch', [CONV_ONLY, TWO_STAGES], ids=['conv', 'both'])
def test_the_degree_is_that_at_which_features_grow(arch):
    """The largest power of a polynomial is all that counts far out."""
    model, images = tiny((32, 32), arch=arch)
    far = 1000.0
    with torch.no_grad():
        near, twice = model(far * images), model(2 * far * images)
    for degree, a, b in zip(get_arch(arch).degrees, near, twice):
        if degree < 64:  # and a number of float64
            assert torch.log2(b.norm() / a.norm()).item() == pytest.approx(degree, abs=0.1)


# What may be in an exported graph: the arithmetic of polynomials, and moving numbers about
ARITHMETIC = {'Conv', 'MatMul', 'Gemm', 'Add', 'Mul'}
MOVEMENT = {
    'Transpose',
    'Reshape',
    'Split',
    'Slice',
    'Concat',
    'Gather',
    'Expand',
    'Unsqueeze',
    'Squeeze',
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ('arch', 'size'),
    [
        pytest.param(TWO_STAGES, (32, 32), id='both mixers'),
        pytest.param(CONV_ONLY, (48, 32), id='C at another size', marks=pytest.mark.slow),
        pytest.param(TINY_ARCH, (48, 32), id='A at another size', marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_adds_and_multiplies_alone(arch, size):
    model = build(arch=arch, norm='bn').eval()
    model.load_state_dict(tiny((32, 32), arch=arch, gates=-3.0)[0].state_dict(), strict=False)
    assert_exports_additions_and_multiplications(model, size, 1e-5)


def assert_exports_additions_and_multiplications(model, size, tolerance):
    """Look at the operators of the fused backbone as ONNX, and at what they compute."""
    onnxruntime = pytest.importorskip('onnxruntime')

    images = golden.image(size)
    with torch.no_grad():
        expected = model(images)
    assert all(feature.isfinite().all() for feature in expected)
    program = torch.onnx.export(model.fuse(size), (images,), dynamo=True, verbose=False)
    operators = {node.op_type for node in program.model.graph.all_nodes()}
    assert {'Conv', 'MatMul', 'Add', 'Mul'} <= operators <= ARITHMETIC | MOVEMENT
    assert not program.model.functions
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=['CPUExecutionProvider']
    )
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert_close([torch.from_numpy(output) for output in outputs], expected, tolerance)
