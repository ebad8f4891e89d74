"""The whole model under torch.compile, exporters, autocast, dtypes and memory formats."""

import onnxruntime
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import GRIDS, ONE, TWO, create, images

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


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16, pool_type='max')], ids=['one', 'two'])
def test_onnx(tmp_path, kwargs):
    model = create(**kwargs)
    x = images(size=64)
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=['image'], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {'image': x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-3)


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
