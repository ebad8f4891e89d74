"""The ops as PyTorch sees them: opcheck, autocast, compilers, exporters."""

import pytest
import torch
from op_cases import TOLERANCES, classifier, deviation, double, features, run

from timm_bilinear import ops
from timm_bilinear.layers import BilinearHead
from timm_bilinear.ops import bilinear_classify, bilinear_pool, library, reference

# opcheck's tests of an op that has no derivative
FORWARD_ONLY = ('test_schema', 'test_faketensor')

pytestmark = pytest.mark.usefixtures('clean_up')


@pytest.mark.parametrize('pool', ['avg', 'sum'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
def test_opcheck(two, dtype, pool):
    a, b = features(6, 5, dtype=dtype), features(4, 5, dtype=dtype) if two else None
    weight, bias = classifier(6, 4 if two else None, dtype=dtype)
    # The backward ops: their fake implementations, that is. In the layout of channels_last too, which gradients keep.
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        a, b = layout(a), b if b is None else layout(b)
        y, _, scale = library.bilinear_pool(a, b, pool, 1e-5)
        torch.library.opcheck(
            library.bilinear_pool_backward, (torch.randn_like(y), y, scale, a, b, pool, 1e-5), test_utils=FORWARD_ONLY
        )
        logits, *kept = library.bilinear_classify(a, b, weight, bias, pool, 1e-5, False, None)
        for need in ((True, True, False), (True, False, True), (False, True, False)):
            torch.library.opcheck(
                library.bilinear_classify_backward,
                (torch.randn_like(logits), *kept, a, b, weight, pool, 1e-5, *need, torch.float32),
                test_utils=FORWARD_ONLY,
            )
    for x in (a, b, weight, bias):
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(library.bilinear_pool, (a, b, pool, 1e-5))
    for recompute in (False, True):
        torch.library.opcheck(library.bilinear_classify, (a, b, weight, bias, pool, 1e-5, recompute, None))


def test_compile_transposed_weight():
    a, parameter = features(5, 4), classifier(5)[0].t().contiguous().requires_grad_()

    def loss(weight):
        return bilinear_classify(a, None, weight.t()).square().sum()

    want = torch.autograd.grad(loss(parameter), parameter)[0]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend='aot_eager')(parameter), parameter)[0]
    torch.testing.assert_close(got, want)


def test_direct_calls_ignore_autocast():
    a = features(6, 5).requires_grad_()
    weight, bias = classifier(6)
    want = library.bilinear_classify(a, None, weight, bias, 'avg', 1e-5, False, None)
    with torch.autocast('cpu', torch.bfloat16):
        got = library.bilinear_classify(a, None, weight, bias, 'avg', 1e-5, False, None)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    grads = [torch.autograd.grad(x[0].sum(), a)[0] for x in (got, want)]
    assert torch.equal(*grads)


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_autocast(pool, two):
    # As in a mixed precision step: bfloat16 features, float32 master weights.
    a, b = features(12, 5, 5).bfloat16(), features(10, 5, 5).bfloat16() if two else None
    weight, bias = classifier(12, 10 if two else None)

    def with_autocast(*x):
        with torch.autocast('cpu', torch.bfloat16):
            return bilinear_classify(*x, pool=pool)

    grad = torch.randn(2, 4).bfloat16()
    got = run(with_autocast, (a, b, weight, bias), grad)
    want = run(lambda *x: reference.bilinear_classify(*x, pool, 1e-10), double(a, b, weight, bias), grad)
    assert [x.dtype for x in got] == [torch.bfloat16] * (3 if two else 2) + [torch.float32] * 2
    for x, y in zip(got, want):
        # float32 inside: only what is stored in bfloat16 is rounded to it
        assert deviation(x, y) < TOLERANCES[x.dtype][0]
    with torch.autocast('cpu', torch.bfloat16):
        assert bilinear_pool(a, b, pool=pool).dtype == torch.bfloat16
        assert bilinear_pool(a.float(), None if b is None else b.float(), pool=pool).dtype == torch.bfloat16
        # A stream in each dtype is fine here too.
        assert b is None or bilinear_pool(a, b.float(), pool=pool).dtype == torch.bfloat16


def test_autocast_float32_features_keep_their_precision():
    a = features(12, 7)
    weight, bias = classifier(12)
    with torch.autocast('cpu', torch.bfloat16):
        got = bilinear_classify(a, None, weight, bias)
    assert torch.equal(got, bilinear_classify(a, None, weight, bias).bfloat16())


def both(a, b, weight, bias, pool):
    return bilinear_classify(a, b, weight, bias, pool=pool), bilinear_pool(a, b, pool=pool)


@pytest.mark.parametrize('two,pool', [(False, 'avg'), (True, 'sum'), (False, 'max')])
@pytest.mark.parametrize('backend', ['inductor', 'aot_eager'])
def test_compile(backend, two, pool):
    if backend == 'inductor' and pool == 'sum':
        pytest.skip('one of each path is enough for the slow backend')
    inputs = (features(12, 4, 4), features(10, 4, 4) if two else None, *classifier(12, 10 if two else None))
    compiled = torch.compile(both, fullgraph=True, backend=backend)

    def loss(fn):
        return lambda *x: sum(out.square().sum() for out in fn(*x, pool))

    for x, y in zip(run(loss(compiled), inputs, torch.ones(())), run(loss(both), inputs, torch.ones(()))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_compile_dynamic_batch():
    compiled = torch.compile(bilinear_classify, fullgraph=True, backend='aot_eager', dynamic=True)
    weight, bias = classifier(12)
    for batch, size in ((2, 4), (3, 4), (5, 6)):
        a = features(12, size, size, batch=batch)
        torch.testing.assert_close(compiled(a, None, weight, bias), bilinear_classify(a, None, weight, bias))


@pytest.mark.parametrize('two', [False, True], ids=['one', 'two'])
@pytest.mark.parametrize('pool', ops.POOL_TYPES)
def test_export(pool, two):

    class Both(torch.nn.Module):
        def forward(self, a, b, weight, bias):
            return both(a, b, weight, bias, pool)

    inputs = (features(12, 4, 4), features(10, 4, 4) if two else None, *classifier(12, 10 if two else None))
    batch, height = torch.export.Dim('batch', min=2, max=64), torch.export.Dim('height', min=2, max=64)
    free = {0: batch, 2: height}
    program = torch.export.export(
        Both(), inputs, dynamic_shapes=dict(a=free, b=free if two else None, weight=None, bias=None)
    )
    # The graph is for runtimes that have never heard of this package.
    assert not [n for n in program.graph.nodes if 'timm_bilinear' in str(n.target)]
    other = (features(12, 6, 4, batch=3), features(10, 6, 4, batch=3) if two else None, *inputs[2:])
    for x, y in zip(program.module()(*other), both(*other, pool)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_fast_path_is_taken(monkeypatch):
    # All comparisons above would pass, slowly, if everything went to the reference.
    monkeypatch.setattr(reference, 'bilinear_pool', None)
    monkeypatch.setattr(reference, 'bilinear_classify', None)
    a = features(6, 5)
    weight, bias = classifier(6)
    for pool in ('avg', 'sum'):
        bilinear_pool(a, pool=pool)
        bilinear_classify(a, None, weight, bias, pool=pool)


def test_eager_calls_go_past_the_dispatcher(monkeypatch):
    a = features(6, 5).requires_grad_()
    weight, bias = (x.requires_grad_() for x in classifier(6))
    monkeypatch.setattr(library, '_ops', None)
    for recompute in (False, True):
        bilinear_classify(a, None, weight, bias, recompute=recompute).sum().backward()
    bilinear_pool(a).sum().backward()
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(AttributeError):
        library.classify(a, None, weight, bias, 'avg', 1e-5, False, None)


@pytest.mark.parametrize('dynamic', [None, True])
def test_compiled_graphs_have_the_op(dynamic):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    inputs = (features(12, 4, 4), None, *classifier(12))
    torch.compile(both, fullgraph=True, backend=backend, dynamic=dynamic)(*inputs, 'avg')
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any('bilinear_pool' in t for t in targets) and any('bilinear_classify' in t for t in targets), targets

    graphs.clear()
    torch.compile(BilinearHead(12, 3), fullgraph=True, backend=backend, dynamic=dynamic)(inputs[0])
    assert any('bilinear_classify' in str(node.target) for graph in graphs for node in graph.graph.nodes)
