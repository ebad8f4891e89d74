"""The head: what its options mean, and that its two ways to the logits are one."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from timm_bilinear.layers import BilinearHead
from timm_bilinear.ops import bilinear_pool

VARIANTS = {
    'one': {},
    'two': dict(in_features_b=10),
    'projected': dict(proj_dim=6),
    'two projected': dict(in_features_b=10, proj_dim=6),
    'one of two projected': dict(in_features_b=5, proj_dim=6),
}
SIZES = {'one': 78, 'two': 120, 'projected': 21, 'two projected': 36, 'one of two projected': 30}
CHANNELS = 12


@pytest.fixture(params=VARIANTS, ids=lambda v: v.replace(' ', '_'))
def variant(request):
    return request.param


def head_and_features(variant, num_classes=4, size=5, dtype=torch.float32, **kwargs):
    head = BilinearHead(CHANNELS, num_classes, dtype=dtype, **VARIANTS[variant], **kwargs)
    return head, torch.randn(3, CHANNELS + VARIANTS[variant].get('in_features_b', 0), size, size + 1, dtype=dtype)


@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
def test_shapes(variant, pool_type):
    head, x = head_and_features(variant, pool_type=pool_type)
    assert head.num_features == SIZES[variant]
    assert isinstance(head.fc, nn.Linear) and head.fc.weight.shape == (4, SIZES[variant])
    assert head(x).shape == (3, 4)
    z = head(x, pre_logits=True)
    assert z.shape == (3, SIZES[variant])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(head.fc(z), head(x))


@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
def test_is_pool_of_projections(variant, pool_type):
    head, x = head_and_features(variant, num_classes=0, pool_type=pool_type, eps=1e-3)
    a = head.proj_a(x[:, :CHANNELS])
    b = None if head.proj_b is None else head.proj_b(x[:, CHANNELS:])
    assert torch.equal(head(x), bilinear_pool(a, b, pool=pool_type, eps=1e-3))


def test_num_classes_zero(variant):
    head, x = head_and_features(variant, num_classes=0)
    assert isinstance(head.fc, nn.Identity)
    assert head(x).shape == (3, SIZES[variant]) and torch.equal(head(x), head(x, pre_logits=True))


def test_no_pool(variant):
    head, x = head_and_features(variant, num_classes=0, pool_type='')
    assert head(x) is x and head(x, pre_logits=True) is x


@pytest.mark.parametrize(
    'proj_dim,projected_a,projected_b',
    [(None, False, False), (4, True, True), (9, True, True), (10, True, False), (12, False, False), (99, False, False)],
)
def test_proj_dim_leaves_narrow_streams_alone(proj_dim, projected_a, projected_b):
    head = BilinearHead(12, 4, in_features_b=10, proj_dim=proj_dim)
    widths = []
    for proj, channels, projected in ((head.proj_a, 12, projected_a), (head.proj_b, 10, projected_b)):
        assert isinstance(proj, nn.Conv2d if projected else nn.Identity)
        widths.append(proj_dim if projected else channels)
        if projected:
            assert proj.weight.shape == (proj_dim, channels, 1, 1) and proj.bias is None
    assert (head.channels, head.channels_b) == tuple(widths)
    assert head.num_features == widths[0] * widths[1]


def test_projection_keeps_inner_products():
    # In expectation: of 4096 random features here, to a few standard deviations of 1 / sqrt(proj_dim).
    head = BilinearHead(4096, 0, proj_dim=1024)
    x, y = torch.randn(2, 1, 4096, 1, 1)
    px, py = head.proj_a(x), head.proj_a(y)
    assert 0.8 < (px.square().sum() / x.square().sum()).item() < 1.2
    assert abs((px * py).sum() - (x * y).sum()) < 5 * 4096 / 1024**0.5


def test_dropout(variant):
    head, x = head_and_features(variant, drop_rate=0.5)
    plain = copy.deepcopy(head)
    plain.drop.p = 0.0
    head.train()
    assert not torch.equal(head(x), head(x)) and not torch.equal(head(x), plain(x))
    # Half the descriptor is dropped, the rest doubled, before the classifier.
    torch.manual_seed(1)
    z = head(x, pre_logits=True)
    kept = z != 0
    assert 0.25 < kept.float().mean() < 0.75
    torch.testing.assert_close(z[kept], 2 * plain(x, pre_logits=True)[kept])
    torch.manual_seed(1)
    torch.testing.assert_close(head(x), head.fc(z))
    head.eval()
    assert torch.equal(head(x), plain(x)) and torch.equal(head(x), head(x))
    assert torch.equal(head(x, pre_logits=True), plain(x, pre_logits=True))


@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
def test_fused_is_unfused(variant, pool_type):
    head, x = head_and_features(variant, pool_type=pool_type)
    x.requires_grad_()
    leaves = [x, *head.parameters()]
    grads = []
    for logits in (head(x), head.fc(head(x, pre_logits=True))):
        grads.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), leaves)])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


def test_hooked_or_replaced_classifier():
    # A classifier that is not a Linear cannot be fused, and must still be called.
    head, x = head_and_features('one')
    want = head(x)
    head.fc = nn.Sequential(head.fc, nn.Hardtanh(-0.01, 0.01))
    torch.testing.assert_close(head(x), want.clamp(-0.01, 0.01))


def test_reset(variant):
    head, x = head_and_features(variant)
    head.eval()
    head.reset(7)
    assert head(x).shape == (3, 7) and not head.fc.training
    assert head.pool_type == 'avg'
    head.reset(2, 'max')
    assert head.pool_type == 'max' and head(x).shape == (3, 2)
    head.reset(0)
    assert head.pool_type == 'max' and isinstance(head.fc, nn.Identity)
    assert head(x).shape == (3, SIZES[variant])
    head.reset(0, '')
    assert head(x) is x
    head.reset(5, 'sum')
    assert head(x).shape == (3, 5)
    assert head.train().fc.training


def test_reset_dtype(variant):
    head, x = head_and_features(variant, dtype=torch.float64)
    head.reset(7)
    assert head(x).dtype == head.fc.weight.dtype == torch.float64
    head.reset(7, dtype=torch.float32)
    assert head.fc.weight.dtype == torch.float32


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
def test_torchscript(variant, pool_type):
    head, x = head_and_features(variant, pool_type=pool_type)
    head.eval()
    scripted = torch.jit.script(head)
    torch.testing.assert_close(scripted(x), head(x))
    torch.testing.assert_close(scripted(x, pre_logits=True), head(x, pre_logits=True))


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_torchscript_headless():
    head, x = head_and_features('two', num_classes=0)
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))
    head, x = head_and_features('two', num_classes=0, pool_type='')
    assert torch.equal(torch.jit.script(head)(x), x)


@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
def test_gradcheck(variant, pool_type):
    head, x = head_and_features(variant, num_classes=2, size=2, dtype=torch.float64, pool_type=pool_type, eps=1e-2)
    names, params = zip(*head.named_parameters())
    assert gradcheck(
        lambda x, *params: torch.func.functional_call(head, dict(zip(names, params)), (x,)),
        (x[:2].requires_grad_(), *params),
        fast_mode=True,
    )


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_memory_format(variant, memory_format):
    head, x = head_and_features(variant)
    torch.testing.assert_close(head(x.contiguous(memory_format=memory_format)), head(x))


@pytest.mark.parametrize(
    'kwargs,message',
    [
        (dict(in_features=0), r"'in_features' must be positive, got 0"),
        (dict(in_features_b=0), r"'in_features_b' must be positive, got 0"),
        (dict(in_features_b=-3), r"'in_features_b' must be positive, got -3"),
        (dict(proj_dim=0), r"'proj_dim' must be positive, got 0"),
        (dict(num_classes=-1), r"'num_classes' must not be negative, got -1"),
        (dict(eps=0.0), r"'eps' must be positive and finite, got 0\.0"),
        (dict(eps=float('nan')), r"'eps' must be positive and finite, got nan"),
        (dict(pool_type='mean'), r"'pool_type' must be one of 'avg', .*'sum' or '', got 'mean'"),
        (dict(pool_type='mean', num_classes=0), r"'pool_type' must be one of 'avg', .*'sum' or '', got 'mean'"),
    ],
)
def test_argument_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BilinearHead(**dict(dict(in_features=8, num_classes=3), **kwargs))


def test_classifier_without_pool_is_an_error():
    with pytest.raises(ValueError, match="'pool_type'"):
        BilinearHead(8, 3, pool_type='')(torch.randn(2, 8, 3, 3))


def test_reset_errors_change_nothing():
    head, x = head_and_features('one')
    want = head(x)
    with pytest.raises(ValueError, match=r"'pool_type'.*'mean'"):
        head.reset(5, 'mean')
    assert torch.equal(head(x), want)


def test_reset_negative_num_classes():
    with pytest.raises(ValueError, match="'num_classes'"):
        head_and_features('one')[0].reset(-1)


@pytest.mark.parametrize('shape', [(2, 12, 5), (2, 11, 5, 5), (2, 22, 5, 5), (12, 5, 5), (2, 5, 5, 12)])
def test_input_errors(shape):
    head, _ = head_and_features('one')
    with pytest.raises(ValueError, match=r'\(B, 12, H, W\).*' + str(shape[0])):
        head(torch.randn(shape))


def test_not_finite_input():
    head, x = head_and_features('two')
    want = head(x)
    x[0, 0, 0, 0] = float('inf')
    logits = head(x)
    assert logits[0].isnan().all() and torch.equal(logits[1:], want[1:])


def test_empty_batch(variant):
    head, x = head_and_features(variant)
    for mode in (True, False):
        head.train(mode)
        assert head(x[:0]).shape == (0, 4)
        assert head(x[:0], pre_logits=True).shape == (0, SIZES[variant])


@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_under_activation_checkpointing(variant, grad_checkpointing):
    head, x = head_and_features(variant)
    x.requires_grad_()
    want = torch.autograd.grad(head(x).square().sum(), [x, *head.parameters()])
    head.grad_checkpointing = grad_checkpointing
    got = torch.autograd.grad(checkpoint(head, x, use_reentrant=False).square().sum(), [x, *head.parameters()])
    assert all(torch.equal(g, w) for g, w in zip(got, want))
