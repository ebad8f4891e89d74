"""The whole model under torch.compile, exporters, autocast, dtypes and memory formats."""

import onnxruntime
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import GRIDS, ONE, TWO, create, images

from timm_bilinear.models.streams import match_grid

pytestmark = pytest.mark.usefixtures('clean_up')


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_compile(kwargs):
    # The graph is what is at stake, and takes a fraction of inductor's time; the ops' own tests go through inductor.
    model = create(**kwargs)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    labels = torch.tensor([0, 1])
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    grads = []
    for f in (model, compiled):
        model.zero_grad()
        F.cross_entropy(f(x), labels).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)


def test_compile_inductor():
    model = create(**ONE)
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_export(kwargs):
    model = create(**kwargs)
    x = images(size=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    assert not [n for n in program.graph.nodes if 'timm_bilinear' in str(n.target)]
    x = images(batch=3, size=64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


# Grids that divide one another, and that do not: 6 x 6 and 3 x 3, 5 x 5 and 2 x 2, 5 x 5 and 10 x 10.
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    'kwargs,size,dynamo',
    [
        (ONE, 64, False),
        (ONE, 64, True),
        (dict(GRIDS, proj_dim=16, pool_type='max'), 96, False),
        (dict(GRIDS, proj_dim=16, pool_type='max'), 96, True),
        (dict(GRIDS, proj_dim=16), 80, False),
        (dict(GRIDS, proj_dim=16), 80, True),
        (dict(ONE, backbone_b='test_vit'), 160, False),
    ],
)
def test_onnx(tmp_path, kwargs, size, dynamo):
    model = create(**kwargs)
    path = str(tmp_path / 'model.onnx')
    batch = {0: torch.export.Dim('batch', min=1, max=64)} if dynamo else {0: 'batch'}
    options = dict(dynamic_shapes=(batch,), verbose=False) if dynamo else dict(dynamic_axes=dict(image=batch))
    opset = {} if dynamo else dict(opset_version=17)
    torch.onnx.export(model, (images(size=size),), path, dynamo=dynamo, input_names=['image'], **options, **opset)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for number in (1, 3):
        x = images(batch=number, size=size)
        (logits,) = session.run(None, {'image': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('grid,other', [((6, 6), (4, 3)), ((5, 8), (7, 3)), ((9, 1), (3, 1)), ((13, 17), (4, 5))])
def test_exported_pooling_is_adaptive_pooling(grid, other):
    class Match(nn.Module):
        def forward(self, a, b):
            return match_grid(a, b)

    a, b = torch.randn(2, 3, *grid), torch.randn(2, 4, *other)
    expected = F.adaptive_avg_pool2d(a, [min(s) for s in zip(grid, other)])
    program = torch.export.export(Match(), (a, b))
    assert not [n for n in program.graph.nodes if 'adaptive' in str(n.target)]
    torch.testing.assert_close(program.module()(a, b), expected)
    assert torch.equal(match_grid(a, b), expected)


def test_export_with_any_size():
    # Grids that are not known stay adaptive.
    model = create(**dict(GRIDS, proj_dim=16))
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (images(size=96),), dynamic_shapes=(sizes,))
    x = images(batch=3, size=96)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_torchscript(kwargs):
    model = create(scriptable=True, **kwargs)
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_autocast(kwargs):
    model = create(**kwargs)
    x = images()
    with torch.no_grad():
        expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max().clamp_min(0.1)
    F.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype(dtype):
    model = create(dtype=dtype, **dict(TWO, proj_dim=16))
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(images(dtype=dtype))
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_channels_last(kwargs):
    model = create(**kwargs)
    x = images()
    labels = torch.tensor([0, 1])

    def run(model, x):
        model.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, labels).backward()
        return logits.detach().clone(), [p.grad.clone().contiguous() for p in model.parameters()]

    expected = run(model, x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert not model.forward_features(x).is_contiguous() or model.stream_b is not None
    logits, grads = run(model, x)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads, expected[1], atol=1e-4, rtol=1e-2)
