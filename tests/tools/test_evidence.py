"""Evidence sums to the logit, for every pooling that says what locations give, and is what the formula says."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations as parametrizations
from small_models import GRIDS, ONE, TWO, create, images

import timm_bilinear
from timm_bilinear.layers import BilinearPooling, list_poolings
from timm_bilinear.layers.pooling import most_streams
from timm_bilinear.ops import unfold_symmetric_weight
from timm_bilinear.tools.evidence import explain_beside, explain_pairs

STREAMS = [(name, n) for name in list_poolings() for n in ('one', 'two') if n == 'one' or most_streams(name) > 1]
KWARGS = {'one': ONE, 'two': GRIDS}


def double(**kwargs):
    net = create(**kwargs).double()
    nn.init.normal_(net.head.fc.bias)
    return net


def sums(found):
    return found.maps.sum((1, 2)) + found.unlocated + found.bias


@pytest.mark.parametrize('name, streams', STREAMS)
def test_sums_to_the_logit(name, streams):
    net = double(pool_type=name, **KWARGS[streams])
    x = images(dtype=torch.float64)
    logits = net(x).detach()
    found = timm_bilinear.explain(net, x)
    assert torch.equal(found.target, logits.argmax(1)) and found.contrast is None
    torch.testing.assert_close(found.logit, logits.amax(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(sums(found), found.logit, rtol=0, atol=1e-9)
    assert found.maps.shape[1:] == net.forward_features(x).shape[2:] and not found.unlocated.any()
    assert found.maps.std() > 1e-6
    for channels in found.channels:
        assert len(channels) == 2
    if found.channels:
        assert len(found.channels) == {'one': 1, 'two': 2}[streams]
        torch.testing.assert_close(sum(c.sum(1) for c in found.channels), found.maps.sum((1, 2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize('name, streams', STREAMS)
def test_contrast_is_a_difference(name, streams):
    net, x = double(pool_type=name, **KWARGS[streams]), images(dtype=torch.float64)
    found = timm_bilinear.explain(net, x, 3, [0, 4])
    one, other = timm_bilinear.explain(net, x, [3, 3]), timm_bilinear.explain(net, x, torch.tensor([0, 4]))
    torch.testing.assert_close(found.maps, one.maps - other.maps, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.logit, one.logit - other.logit, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums(found), found.logit, rtol=0, atol=1e-9)


@pytest.mark.parametrize('name, streams', STREAMS)
def test_rather_than_the_rest(name, streams):
    """The mean of the other classes, as their own maps give it."""
    net, x = double(pool_type=name, **KWARGS[streams]), images(dtype=torch.float64)
    found = timm_bilinear.explain(net, x, 1, 'rest')
    each = [timm_bilinear.explain(net, x, k) for k in range(net.num_classes)]
    others = [one for k, one in enumerate(each) if k != 1]
    for key in ('maps', 'logit', 'bias', 'unlocated'):
        wanted = getattr(each[1], key) - sum(getattr(one, key) for one in others) / len(others)
        torch.testing.assert_close(getattr(found, key), wanted, rtol=0, atol=1e-9)
    assert found.contrast == 'rest' and torch.equal(found.target, torch.tensor([1, 1]))
    torch.testing.assert_close(sums(found), found.logit, rtol=0, atol=1e-9)
    one, rather = explain_beside(net, x)
    assert torch.equal(one.target, net(x).argmax(1)) and torch.equal(rather.target, one.target)
    for i in range(2):
        assert torch.allclose(one.maps[i], each[one.target[i]].maps[i], rtol=0, atol=1e-9)


def test_rest_is_what_a_softmax_sees():
    """What is added to the weights of every class changes the evidence of each, and not what speaks for it rather."""
    net, x = double(**ONE), images(dtype=torch.float64)
    alone, rather = (timm_bilinear.explain(net, x, 2, c) for c in (None, 'rest'))
    with torch.no_grad():
        net.head.fc.weight += torch.randn_like(net.head.fc.weight[:1])
    again, rather_again = (timm_bilinear.explain(net, x, 2, c) for c in (None, 'rest'))
    assert (alone.maps - again.maps).abs().max() > 1e-3
    torch.testing.assert_close(rather.maps, rather_again.maps, rtol=0, atol=1e-9)


def test_classifier_in_training():
    """A classifier of one's own with dropout is explained as it predicts, whatever mode the model is in."""
    net, x = create(**ONE), images()
    net.head.fc = nn.Sequential(nn.Dropout(0.9), net.head.fc)
    wanted = net.eval()(x).detach()
    found = timm_bilinear.explain(net.train(), x, 0, 'rest')
    torch.testing.assert_close(sums(found), wanted[:, 0] - wanted[:, 1:].mean(1), rtol=0, atol=1e-4)
    assert net.head.fc.training


def test_contrast_with_the_predicted_class():
    net, x = double(pool_type='avg', **ONE), images(dtype=torch.float64)
    first, second = net(x).topk(2)[1].unbind(1)
    assert torch.equal(timm_bilinear.explain(net, x, contrast=first).target, second)
    assert torch.equal(timm_bilinear.explain(net, x, contrast=second).target, first)


@pytest.mark.parametrize('name', list_poolings())
def test_float32(name):
    net, x = create(pool_type=name, **ONE), images()
    found = timm_bilinear.explain(net, x, 1)
    torch.testing.assert_close(sums(found), net(x).detach()[:, 1], rtol=0, atol=1e-4)


def evidence_reference(a, b, weight, eps):
    """e_l = a_l^T M b_l / N, M = W * Y / (|Y| Z), by location, of one image and class; W is of full matrices."""
    channels, count = a.shape
    z = sum(torch.outer(a[:, n], b[:, n]) for n in range(count)) / count
    y = z.sign() * ((z.abs() + eps).sqrt() - eps**0.5)
    m = weight.view(channels, len(b)) * torch.where(z == 0, 0.0, y / z) / y.norm()
    return torch.stack([a[:, n] @ m @ b[:, n] / count for n in range(count)])


@pytest.mark.parametrize('kwargs', [ONE, TWO], ids=['one', 'two'])
def test_formula(kwargs):
    net, x = double(**kwargs), images(dtype=torch.float64)
    features = net.forward_features(x).detach().flatten(2)
    found = timm_bilinear.explain(net, x, [1, 2])
    weight = net.head.fc.weight.detach()
    if net.head.proj_b is None:
        a = b = features
        weight = unfold_symmetric_weight(weight)
    else:
        a, b = features[:, : net.head.in_features], features[:, net.head.in_features :]
    for i, k in enumerate((1, 2)):
        wanted = evidence_reference(a[i], b[i], weight[k], 1e-10)
        torch.testing.assert_close(found.maps[i].flatten(), wanted, rtol=0, atol=1e-12)


def test_projected():
    net, x = double(proj_dim=8, proj_type='conv_bn_relu', pool_type='isqrt', **ONE), images(dtype=torch.float64)
    found = timm_bilinear.explain(net, x)
    torch.testing.assert_close(sums(found), net(x).detach().amax(1), rtol=0, atol=1e-9)
    assert found.channels[0].shape == (2, 8)


def test_iterated_root():
    net, x = double(pool_type='sqrtm', iterations=5, **ONE), images(dtype=torch.float64)
    torch.testing.assert_close(sums(timm_bilinear.explain(net, x)), net(x).detach().amax(1), rtol=0, atol=1e-9)


def test_levels():
    net = double(pool_type='cross', out_indices_a=(3, 4), **ONE)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(sums(timm_bilinear.explain(net, x)), net(x).detach().amax(1), rtol=0, atol=1e-9)


def test_class_token_has_no_location():
    net = timm.create_model('bcnn', backbone_a='test_vit', pool_type='moments', class_token=True, num_classes=5)
    net = net.double().eval()
    x = images(size=160, dtype=torch.float64)
    found = timm_bilinear.explain(net, x)
    torch.testing.assert_close(sums(found), net(x).detach().amax(1), rtol=0, atol=1e-9)
    assert found.unlocated.abs().min() > 1e-6


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_mean_of_features(name):
    """The class activation map of Zhou et al., of networks that classify the mean."""
    net, x = timm.create_model(name, num_classes=5).double().eval(), images(dtype=torch.float64)
    found = timm_bilinear.explain(net, x, 2)
    features = net.forward_features(x)
    wanted = torch.einsum('bchw,c->bhw', features, net.get_classifier().weight[2]) / features[0, 0].numel()
    torch.testing.assert_close(found.maps, wanted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sums(found), net(x).detach()[:, 2], rtol=0, atol=1e-9)


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
def test_no_such_sum(name):
    net = timm.create_model(name, num_classes=5).eval()
    with pytest.raises(ValueError, match=f'{name} '):
        timm_bilinear.explain(net, images(size=160))


def test_pooling_that_does_not_say():
    class Silent(BilinearPooling):
        def forward(self, a, b=None):
            return a.mean((2, 3))

    net = create(**ONE)
    net.head.pool = Silent()
    net.head.fc = nn.Linear(net.head.in_features, 5)
    with pytest.raises(ValueError, match='Silent does not say'):
        timm_bilinear.explain(net, images())


@pytest.mark.parametrize('kind', ['weight norm', 'sequential', 'hook'])
def test_classifier_that_is_no_plain_linear(kind):
    net = double(**ONE)
    if kind == 'weight norm':
        parametrizations.weight_norm(net.head.fc)
    elif kind == 'sequential':
        net.head.fc = nn.Sequential(net.head.fc, nn.Linear(5, 5).double())
    else:
        net.head.fc.register_forward_hook(lambda module, args, out: 2 * out)
    x = images(dtype=torch.float64)
    found = timm_bilinear.explain(net, x)
    torch.testing.assert_close(sums(found), net(x).detach().amax(1), rtol=0, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kind', ['layer norm', 'relu', 'tanh', 'softmax', 'unit length', 'hook'])
def test_classifier_that_is_not_affine(kind, dtype):
    """What is left of such a logit would be called its bias."""
    net = create(**ONE)
    size = net.head.fc.in_features
    if kind == 'hook':
        net.head.fc.register_forward_hook(lambda module, args, out: out.relu())
    else:
        net.head.fc = {
            'layer norm': lambda: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 5)),
            'relu': lambda: nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 5)),
            'tanh': lambda: nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 5)),
            'softmax': lambda: nn.Sequential(nn.Linear(size, 5), nn.LogSoftmax(1)),
            'unit length': lambda: UnitLength(size, 5),
        }[kind]()
    name = type(net.head.fc).__name__
    with pytest.raises(ValueError, match=f'no sum over locations: its classifier, of class {name}, is not linear'):
        timm_bilinear.explain(net.to(dtype).eval(), images(dtype=dtype))


class UnitLength(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', list_poolings())
def test_layers_in_sequence_are_affine(name, dtype):
    """Whatever the rounding of the descriptors and of the classifier."""
    net = create(pool_type=name, **ONE)
    size = net.head.pool.num_features
    layers = (nn.BatchNorm1d(size), nn.Dropout(), nn.Linear(size, 64), nn.Identity(), nn.Linear(64, 5))
    net.head.fc = nn.Sequential(*layers)
    net = net.to(dtype).eval()
    nn.init.normal_(net.head.fc[-1].bias, std=10)
    found = timm_bilinear.explain(net, images(dtype=dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    zero = net.head.fc(torch.zeros(1, size, dtype=dtype)).detach()[0, found.target]
    torch.testing.assert_close(found.bias, zero.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize('name', list_poolings())
def test_finite(name):
    """No evidence where there are no features, and numbers where they are large."""
    net = create(pool_type=name, **ONE)
    net.forward_features = lambda x: x
    for features in (torch.zeros(1, net.num_features, 3, 3), torch.randn(1, net.num_features, 3, 3) * 1e25):
        found = timm_bilinear.explain(net, features, 0)
        assert found.maps.isfinite().all() and found.logit.isfinite().all()


def test_the_model_is_left_as_it_was():
    net = create(**ONE).train()
    net.stream_a.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    timm_bilinear.explain(net, images())
    assert modes == [m.training for m in net.modules()] and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    'args, error, message',
    [
        (([1],), TypeError, "'images'"),
        ((torch.zeros(2, 3, 96, 96, dtype=torch.uint8),), TypeError, "'images'"),
        ((torch.zeros(3, 96, 96),), ValueError, r"'images'.*\(3, 96, 96\)"),
        ((torch.zeros(0, 3, 96, 96),), ValueError, "'images'"),
        ((images(), 5), ValueError, "'target' must be within 0 and 4, got .5, 5."),
        ((images(), -1), ValueError, "'target'"),
        ((images(), 0, 7), ValueError, "'contrast'"),
        ((images(), 0, 'others'), TypeError, "'contrast' must be class indices or 'rest'"),
        ((images(), [0, 1, 2]), ValueError, r"'target' must be one index or 2.*\(3,\)"),
        ((images(), 1.0), TypeError, "'target'"),
        ((images(), 'cat'), TypeError, "'target'.*'cat'"),
        ((images(), True), TypeError, "'target'"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        timm_bilinear.explain(create(**ONE), *args)


def test_no_classifier():
    with pytest.raises(ValueError, match='no classifier'):
        timm_bilinear.explain(create(**dict(ONE, num_classes=0)), images())


@pytest.mark.parametrize('pool_type', ['avg', 'sum'])
@pytest.mark.parametrize('kwargs', [ONE, TWO], ids=['one', 'two'])
def test_pairs(kwargs, pool_type):
    net, x = double(pool_type=pool_type, **kwargs), images(dtype=torch.float64)
    found, whole = explain_pairs(net, x, 1, pairs=6), timm_bilinear.explain(net, x, 1)
    torch.testing.assert_close(found.shares.sum(1), whole.logit - whole.bias, rtol=0, atol=1e-9)
    assert len(set(found.pairs)) == 6
    best = found.shares.sum(0).sort(descending=True).values[:6]
    torch.testing.assert_close(found.maps.sum((0, 2, 3)), best, rtol=0, atol=1e-9)
    # all pairs together are the map
    every = explain_pairs(net, x, 1, pairs=list(range(found.shares.shape[1])))
    torch.testing.assert_close(every.maps.sum(1), whole.maps, rtol=0, atol=1e-9)
    # a pair's channels are those of its map
    i, j = found.pairs[0]
    features = net.forward_features(x).detach()
    b = features if net.head.proj_b is None else features[:, net.head.in_features :]
    product = features[:, i] * b[:, j]
    shape = found.maps[:, 0] / found.maps[:, 0].sum((1, 2), keepdim=True)
    torch.testing.assert_close(shape, product / product.sum((1, 2), keepdim=True), rtol=0, atol=1e-9)


def test_pairs_of_other_poolings():
    with pytest.raises(ValueError, match="'avg' and 'sum'"):
        explain_pairs(create(pool_type='max', **ONE), images())


class Split(nn.Module):
    """A model whose last feature map is what a module gives, for hooks."""

    def __init__(self, model):
        super().__init__()
        self.model, self.map = model, nn.Identity()

    def forward(self, x):
        return self.model.forward_head(self.map(self.model.forward_features(x)))


def raw_map(model, x, target):
    """Feature times gradient, by location, of the package grad-cam before it cuts off what is negative."""
    cams = pytest.importorskip('pytorch_grad_cam')
    split = Split(model)
    cam = cams.HiResCAM(split, [split.map])
    cam(x, [lambda logits: logits[target]] * len(x))
    hooks = cam.activations_and_grads
    (activations,), (gradients,) = hooks.activations, hooks.gradients
    return torch.from_numpy(cam.get_cam_image(x, split.map, None, activations.numpy(), gradients.numpy(), False))


def test_feature_times_gradient_sums_to_nothing():
    """As the logits of unit-length descriptors do not change with the scale of the features; the evidence does not."""
    net, x = create(**ONE), images()
    nn.init.normal_(net.head.fc.weight)
    theirs, ours = raw_map(net, x, 2).double(), timm_bilinear.explain(net, x, 2).maps.double()
    assert (theirs.sum((1, 2)).abs() < 1e-3 * theirs.abs().sum((1, 2))).all()
    assert (ours.sum((1, 2)).abs() > 1e-2 * ours.abs().sum((1, 2))).all()


def test_hirescam_is_the_map_of_a_network_that_classifies_the_mean():
    net, x = timm.create_model('test_resnet', num_classes=5).eval(), images()
    torch.testing.assert_close(raw_map(net, x, 2), timm_bilinear.explain(net, x, 2).maps, rtol=1e-4, atol=1e-6)
