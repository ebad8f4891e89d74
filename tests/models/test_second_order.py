"""Networks of later papers: what they are made of, and their authors' checkpoints. No network."""

import os
import sys

import pytest
import timm
import torch
import torch.nn as nn
from small_models import create, images, randomise_norms
from torchvision import models

from timm_bilinear.hub import save_model

pytestmark = pytest.mark.usefixtures('clean_up')

CLASSES = 14


class BareTriangle(nn.Module):
    """fast-MPN-COV's representation: covariance, five iterations, the upper triangle as it is."""

    def __init__(self, input_dim=None):
        super().__init__()
        if input_dim:  # the projection, where it is not among the features
            self.conv_dr_block = nn.Sequential(nn.Conv2d(input_dim, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU())

    def forward(self, x):
        x = self.conv_dr_block(x) if hasattr(self, 'conv_dr_block') else x
        x = x.flatten(2)
        x = x - x.mean(2, keepdim=True)
        z = x @ x.mT / x.shape[2]
        trace, eye = z.diagonal(0, 1, 2).sum(1)[:, None, None], torch.eye(256)
        y, inverse = z / trace, eye.expand_as(z)
        for _ in range(5):
            step = 0.5 * (3 * eye - inverse @ y)
            y, inverse = y @ step, step @ inverse
        row, col = torch.triu_indices(256, 256)
        return (y * trace.sqrt())[:, row, col]


def stride_one(net):
    """A ResNet whose last stage keeps the grid."""
    block = net.layer4[0]
    block.conv2.stride = block.downsample[0].stride = (1, 1)
    return net


class ImageNetResNet(nn.Module):
    """fast-MPN-COV's ImageNet ResNet: the projection is three layers of the network."""

    def __init__(self, make):
        super().__init__()
        net = stride_one(make(weights=None))
        for name, layer in list(net.named_children())[:-2]:
            self.add_module(name, layer)
        self.layer_reduce = nn.Conv2d(2048, 256, 1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(256)
        self.fc = nn.Linear(32896, CLASSES)

    def forward(self, x):
        for name, layer in self.named_children():
            if name == 'fc':
                return self.fc(BareTriangle()(x.relu()))
            x = layer(x)


class FineTuned(nn.Module):
    """Its model for fine-tuning: features in a Sequential, representation, classifier."""

    def __init__(self, layers, input_dim=None):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.representation = BareTriangle(input_dim)
        self.classifier = nn.Linear(32896, CLASSES)

    def forward(self, x):
        return self.classifier(self.representation(self.features(x)))


def fine_tuned_resnet(make):
    net = ImageNetResNet(make)
    return FineTuned([*list(net.children())[:-1], nn.ReLU()])


def plain_resnet():
    return FineTuned(list(models.resnet50(weights=None).children())[:-2], 2048)


def vgg(make):
    return FineTuned(list(make(weights=None).features.children())[:-1], 512)


CHECKPOINTS = {
    'ImageNet ResNet-50': ('mpncov_resnet50', lambda: ImageNetResNet(models.resnet50), {}),
    'ImageNet ResNet-101': ('mpncov_resnet101', lambda: ImageNetResNet(models.resnet101), {}),
    'fine-tuned ResNet-50': ('mpncov_resnet50', lambda: fine_tuned_resnet(models.resnet50), {}),
    'from a plain ResNet-50': ('mpncov_resnet50', plain_resnet, dict(last_stride=2)),
    'fine-tuned VGG-D': ('mpncov_vgg16_bn', lambda: vgg(models.vgg16_bn), {}),
    'from a plain VGG-16': ('mpncov_vgg16', lambda: vgg(models.vgg16), {}),
}


def load(name, net, tmp_path, num_classes=CLASSES, **kwargs):
    torch.save({'state_dict': {f'module.{k}': v for k, v in net.state_dict().items()}}, tmp_path / 'net.pth.tar')
    overlay = dict(file=str(tmp_path / 'net.pth.tar'), num_classes=CLASSES)
    return timm.create_model(
        name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()


@torch.inference_mode()
def assert_same_logits(model, net):
    x = torch.randn(2, 3, 96, 96)
    want, got = net(x), model(x)
    assert (want[0] - want[1]).abs().max() > 1e-3
    largest = want.abs().max()  # of random weights logits have any size
    torch.testing.assert_close(got / largest, want / largest, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', CHECKPOINTS)
@pytest.mark.parametrize('isometric', [True, False])
def test_fast_mpncov_checkpoints(tmp_path, kind, isometric):
    name, make, kwargs = CHECKPOINTS[kind]
    if not isometric and kind != 'ImageNet ResNet-50':
        pytest.skip('the classifier of one is enough')
    net = randomise_norms(make())
    nn.init.normal_((net.fc if hasattr(net, 'fc') else net.classifier).weight)
    assert_same_logits(load(name, net, tmp_path, isometric=isometric, **kwargs), net)


def test_imagenet_vgg_d_without_its_classifier(tmp_path):
    """Three layers, which a linear classifier is not: the rest loads, for other classes."""
    net = vgg(models.vgg16_bn)
    net.classifier = nn.Sequential(nn.Linear(32896, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES))
    model = load('mpncov_vgg16_bn', net.eval(), tmp_path, num_classes=3)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        want = net.representation.conv_dr_block(net.features(x))
        torch.testing.assert_close(model.head.proj_a(model.forward_features(x)), want)
    with pytest.raises(RuntimeError, match=r'head\.fc\.weight is missing'):
        load('mpncov_vgg16_bn', net, tmp_path)


@pytest.mark.skipif('MPNCOV_REPO' not in os.environ, reason='MPNCOV_REPO does not name a checkout of fast-MPN-COV')
@pytest.mark.parametrize('kind', ['ImageNet', 'fine-tuned', 'VGG-D'])
def test_fast_mpncovs_own_networks(tmp_path, monkeypatch, kind):
    monkeypatch.syspath_prepend(os.environ['MPNCOV_REPO'])
    from model_init import get_model
    from src.network import mpncovresnet50
    from src.representation import MPNCOV

    def representation():
        return dict(function=MPNCOV, iterNum=5, is_sqrt=True, is_vec=True, input_dim=2048, dimension_reduction=None)

    # the network takes the class of that name for its module
    monkeypatch.setattr('src.network.mpncovresnet.MPNCOV', sys.modules['src.representation.MPNCOV'])
    if kind == 'ImageNet':
        net, name = mpncovresnet50(num_classes=CLASSES), 'mpncov_resnet50'
    elif kind == 'fine-tuned':
        monkeypatch.setattr('torch.utils.model_zoo.load_url', lambda _: mpncovresnet50().state_dict())
        net, name = get_model('mpncovresnet50', representation(), CLASSES, 0, pretrained=True), 'mpncov_resnet50'
    else:
        net = get_model('vgg16_bn', dict(representation(), dimension_reduction=256), CLASSES, 0)
        net.classifier, name = nn.Linear(32896, CLASSES), 'mpncov_vgg16_bn'
        nn.init.normal_(net.classifier.weight)
    net = randomise_norms(net.eval())
    assert_same_logits(load(name, net, tmp_path), net)


@pytest.mark.parametrize('name', ['mpncov_resnet50', 'hbp_resnet34', 'lrbp_vgg16', 'cbcnn_vgg16', 'ibcnn_vgg16'])
def test_saved_and_loaded(tmp_path, name):
    model = timm.create_model(name, num_classes=3).eval()
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    x = images(size=64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50', 'regnetx_002'])
def test_last_stride(backbone):
    model, plain = (
        timm.create_model('bcnn', backbone_a=backbone, num_classes=0, last_stride=stride).eval() for stride in (1, None)
    )
    model.load_state_dict(plain.state_dict())
    x = images(size=64)
    assert plain.forward_features(x).shape[-1] == 2 and model.forward_features(x).shape[-1] == 4
    assert model.feature_info[-1]['reduction'] == 16
    assert all(m.dilation == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize('backbone', ['resnet34d', 'convnext_atto', 'vgg11', 'test_vit'])
def test_last_stride_where_there_is_none_to_change(backbone):
    with pytest.raises(ValueError, match=r"'last_stride'.* has no strided convolutions"):
        timm.create_model('bcnn', backbone_a=backbone, last_stride=1)


def test_levels():
    model = create(backbone_a='test_resnet', out_indices_a=(3, 1, -1), pool_type='cross', dim=20, num_classes=5)
    x = images()
    maps = [create(backbone_a='test_resnet', out_index_a=i, num_classes=0) for i in (1, 3, 4)]
    for m in maps:
        m.stream_a.load_state_dict(
            {k: v for k, v in model.stream_a.state_dict().items() if k in m.stream_a.state_dict()}
        )
    want = [m.forward_features(x) for m in maps]
    features = model.forward_features(x)
    grid = features.shape[-2:]
    want = torch.cat([nn.functional.adaptive_avg_pool2d(m, grid) for m in want], 1)
    torch.testing.assert_close(features, want)
    assert model.num_features == features.shape[1] and model.head_hidden_size == 3 * 20
    torch.testing.assert_close(model.forward_intermediates(x)[0], features)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_class_token():
    model = create(backbone_a='test_vit', class_token=True, pool_type='moments', dim=16, num_classes=5)
    x = images(size=160)
    tokens, prefix = model.stream_a.model.forward_intermediates(
        x, indices=1, norm=False, return_prefix_tokens=True, intermediates_only=True
    )[0]
    features = model.forward_features(x)
    torch.testing.assert_close(features, torch.cat([tokens, prefix[:, 0, :, None, None].expand_as(tokens)], 1))
    torch.testing.assert_close(model.forward_intermediates(x)[0], features)
    # a linear classifier of the class token, and one of the covariances
    z = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(z[:, :64], nn.functional.layer_norm(prefix[:, 0], (64,)) / 8)
    torch.testing.assert_close(z[:, :64].norm(dim=1), torch.ones(2), rtol=1e-2, atol=0)
    torch.testing.assert_close(z[:, 64:].view(2, 3, 16).norm(dim=2), torch.ones(2, 3))


@pytest.mark.parametrize(
    'kwargs,message',
    [
        (dict(out_indices_a=(1, 2)), "'avg' does not take several levels"),
        (dict(out_indices_a=(1, 9), pool_type='cross'), r"'out_indices_a' must be in \[-5, 5\)"),
        (dict(out_indices_a=(1, -4), pool_type='cross'), "'out_indices_a' must be different levels"),
        (dict(out_indices_a=(1, 2), pool_type='cross', proj_dim=8), "without 'proj_dim'"),
        (dict(out_indices_a=(1, 2), pool_type='cross', backbone_b='test_resnet'), "'out_indices_a'.*'backbone_b'"),
        (dict(out_indices_a=(0, 1, 2, 3, 4), pool_type='cross'), 'is of 1 to 4 streams, got 5'),
        (dict(class_token=True, pool_type='moments'), "'class_token': 'test_resnet' has none"),
        (dict(pool_type='isqrt', backbone_b='test_convnext'), "'isqrt' is of one stream, got 2"),
        (dict(pool_type='moments', dim=10), "'dim' must be a multiple of 'heads'"),
        (dict(pool_type='sketch', dim=0), "'dim' must be positive"),
    ],
    ids=str,
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(backbone_a='test_resnet', **kwargs)
