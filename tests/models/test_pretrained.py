"""Checkpoints of others and our own, and weights from the Hub's cache. No network."""

import re

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from small_models import randomise_norms, stream_convs

from timm_bilinear.ops import fold_symmetric_weight, unfold_symmetric_weight

pytestmark = pytest.mark.usefixtures('clean_up')

NUM_CLASSES = 14


class ArticleNet(nn.Module):
    """The article's network: torchvision's ResNet-18 up to layer4, classifiers in a list."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
        self.classifiers = nn.ModuleList([nn.Linear(512**2, NUM_CLASSES)])

    def forward(self, x):
        x = self.features(x)
        batch, _, height, width = x.shape
        x = x.view(batch, 512, height * width)
        x = torch.bmm(x, x.transpose(1, 2)) / (height * width)
        x = x.view(batch, 512**2)
        x = F.normalize(torch.sign(x) * torch.sqrt(torch.abs(x) + 1e-10))
        return self.classifiers[0](x)


class AuthorsVGG(nn.Module):
    """VGG-16 without pool5, a bare Sequential."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*list(torchvision.models.vgg16(weights=None).features.children())[:-1])
        self.width = 512

    def forward(self, x):
        return self.model(x)


class AuthorsResNet(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = model.fc.in_features
        del self.model.fc, self.model.avgpool

    def forward(self, x):
        m = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        return m.layer4(m.layer3(m.layer2(m.layer1(x))))


class AuthorsDenseNet(nn.Module):
    """The whole DenseNet, classifier and all, of which `features` are used."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = model.classifier.in_features

    def forward(self, x):
        return F.relu(self.model.features(x))


class AuthorsInception(nn.Module):
    """The whole Inception v3, of which the layers up to Mixed_7c are used."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = model.fc.in_features

    def forward(self, x):
        for name, layer in self.model.named_children():
            x = layer(x) if name not in ('AuxLogits', 'avgpool', 'dropout', 'fc') else x
        return x


class AuthorsExtractors(nn.Module):
    def __init__(self, streams, proj_dim):
        super().__init__()
        if proj_dim:
            streams = [nn.Sequential(s, nn.Conv2d(s.width, proj_dim, 1, bias=False)) for s in streams]
        self.feature_extractors = nn.ModuleList(streams)

    def forward(self, x):
        return [m(x) for m in self.feature_extractors]


class AuthorsNet(nn.Module):
    """The authors' PyTorch release (cvl-umass/bilinear-cnn): one extractor used twice, or two."""

    def __init__(self, *streams, proj_dim=0):
        super().__init__()
        widths = [proj_dim or s.width for s in streams]
        self.feature_extractors = AuthorsExtractors(streams, proj_dim)
        self.fc = nn.Linear(widths[0] * widths[-1], NUM_CLASSES)

    def forward(self, x):
        maps = [m.flatten(2) for m in self.feature_extractors(x)]
        z = torch.bmm(maps[0], maps[-1].transpose(1, 2)) / maps[0].shape[2]
        z = z.flatten(1)
        z = torch.sqrt(F.relu(z) + 1e-5) - torch.sqrt(F.relu(-z) + 1e-5)
        return self.fc(F.normalize(z))


def save(path, state_dict, wrap='plain', prefix=''):
    state_dict = {prefix + k: v for k, v in state_dict.items()}
    torch.save(state_dict if wrap == 'plain' else {wrap: state_dict}, path)
    return str(path)


def load(name, path, num_classes=NUM_CLASSES, checkpoint_classes=NUM_CLASSES, **kwargs):
    overlay = dict(file=str(path), num_classes=checkpoint_classes)
    return timm.create_model(
        name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs
    ).eval()


@torch.inference_mode()
def assert_same_logits(model, expected, size=128, atol=1e-4):
    x = torch.randn(2, 3, size, size)
    expected, logits = expected(x), model(x)
    # A random classifier on unit descriptors tells little unless its logits differ from image to image.
    assert (expected[0] - expected[1]).abs().max() > 10 * atol
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def spread(linear: nn.Linear) -> None:
    """Weights large enough for the descriptor, not the bias, to make the logits."""
    nn.init.normal_(linear.weight, std=0.1)


@pytest.mark.parametrize('wrap,prefix', [('plain', ''), ('state_dict', 'module.')])
def test_article_checkpoint(tmp_path, wrap, prefix):
    net = randomise_norms(ArticleNet())
    spread(net.classifiers[0])
    path = save(tmp_path / 'net.pt', net.state_dict(), wrap, prefix)
    assert_same_logits(load('bcnn_resnet18', path, eps=1e-10), net)


@pytest.mark.parametrize('wrap,prefix', [('plain', ''), ('state_dict', 'module.')])
def test_authors_vgg_checkpoint(tmp_path, wrap, prefix):
    net = AuthorsNet(AuthorsVGG()).eval()
    # torchvision's own init leaves a VGG without pool5 features of ordinary size; a bias makes each layer matter.
    for m in net.feature_extractors.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.bias, std=0.1)
    spread(net.fc)
    keys = {prefix + k for k in net.state_dict()}
    assert {f'{prefix}feature_extractors.feature_extractors.0.model.0.weight', f'{prefix}fc.weight'} <= keys
    path = save(tmp_path / 'net.pt', net.state_dict(), wrap, prefix)
    assert_same_logits(load('bcnn_vgg16', path, eps=1e-5), net)


def test_authors_two_streams(tmp_path):
    net = AuthorsNet(
        AuthorsResNet(torchvision.models.resnet18(weights=None)),
        AuthorsResNet(torchvision.models.resnet34(weights=None)),
    )
    spread(randomise_norms(net).fc)
    path = save(tmp_path / 'net.pt', net.state_dict(), 'state_dict', 'module.')
    assert_same_logits(load('bcnn_resnet18_resnet34', path, eps=1e-5), net)


@pytest.mark.parametrize(
    'arch,extractor',
    [
        ('resnet18', AuthorsResNet),
        ('densenet121', AuthorsDenseNet),
        ('inception_v3', AuthorsInception),
    ],
)
def test_authors_projected(tmp_path, arch, extractor):
    net = AuthorsNet(extractor(getattr(torchvision.models, arch)(weights=None)), proj_dim=24)
    spread(randomise_norms(net).fc)
    path = save(tmp_path / 'net.pt', net.state_dict(), 'state_dict', 'module.')
    assert_same_logits(load('bcnn', path, eps=1e-5, backbone_a=arch, proj_dim=24), net)


# --- our own checkpoints, on a small model

SMALL = dict(backbone_a='test_resnet', proj_dim=16)


def small(num_classes=NUM_CLASSES, **kwargs):
    model = timm.create_model('bcnn', num_classes=num_classes, **dict(SMALL, **kwargs))
    spread(model.head.fc)
    return randomise_norms(model)


@pytest.mark.parametrize('wrap', ['plain', 'state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_own_checkpoint(tmp_path, wrap, prefix):
    model = small()
    path = save(tmp_path / 'own.pt', model.state_dict(), wrap, prefix)
    assert_same_logits(load('bcnn', path, **SMALL), model, size=96, atol=1e-6)


def test_state_dict_module_prefix():
    # A state dict given as such does not pass timm's own cleaning of prefixes.
    model = small()
    state_dict = {f'module.{k}': v for k, v in model.state_dict().items()}
    loaded = timm.create_model(
        'bcnn',
        pretrained=True,
        num_classes=NUM_CLASSES,
        pretrained_cfg_overlay=dict(state_dict=state_dict, num_classes=NUM_CLASSES),
        **SMALL,
    ).eval()
    assert_same_logits(loaded, model, size=96, atol=1e-6)


def test_full_classifier_is_folded(tmp_path):
    model = small()
    state_dict = model.state_dict()
    state_dict['head.fc.weight'] = unfold_symmetric_weight(state_dict['head.fc.weight'])
    # An antisymmetric part meets a symmetric descriptor: it must make no difference.
    skew = torch.randn(NUM_CLASSES, 16, 16)
    state_dict['head.fc.weight'] += (skew - skew.transpose(1, 2)).flatten(1)
    assert state_dict['head.fc.weight'].shape == (NUM_CLASSES, 256)
    assert_same_logits(load('bcnn', save(tmp_path / 'full.pt', state_dict), **SMALL), model, size=96, atol=1e-5)
    folded = fold_symmetric_weight(state_dict['head.fc.weight'])
    torch.testing.assert_close(folded, model.head.fc.weight, atol=1e-5, rtol=0)


def test_two_stream_classifier_is_not_folded(tmp_path):
    # Two streams of equal width also have C * C descriptors, of a matrix that is not symmetric.
    kwargs = dict(backbone_b='test_resnet')
    model = small(**kwargs)
    assert_same_logits(
        load('bcnn', save(tmp_path / 'two.pt', model.state_dict()), **SMALL, **kwargs), model, size=96, atol=1e-6
    )


@pytest.mark.parametrize('channels', [1, 2, 3])
def test_narrow_classifier(tmp_path, channels):
    # One channel: full and packed sizes are both 1.
    model = small(proj_dim=channels)
    path = save(tmp_path / 'narrow.pt', model.state_dict())
    loaded = load('bcnn', path, backbone_a='test_resnet', proj_dim=channels)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_train_script_checkpoint_prefers_ema(tmp_path):
    model, ema = small(), small()
    path = tmp_path / 'model_best.pth.tar'
    torch.save(
        dict(
            epoch=3,
            arch='bcnn',
            state_dict=model.state_dict(),
            version=2,
            state_dict_ema={f'module.{k}': v for k, v in ema.state_dict().items()},
        ),
        path,
    )
    loaded = load('bcnn', path, **SMALL)
    assert_same_logits(loaded, ema, size=96, atol=1e-6)
    assert not torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_safetensors_file(tmp_path):
    model = small()
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'own.safetensors')
    assert_same_logits(load('bcnn', tmp_path / 'own.safetensors', **SMALL), model, size=96, atol=1e-6)


def test_checkpoint_without_batch_counters(tmp_path):
    # Checkpoints of before PyTorch 0.4.1 have no num_batches_tracked.
    model = small()
    state_dict = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert_same_logits(load('bcnn', save(tmp_path / 'old.pt', state_dict), **SMALL), model, size=96, atol=1e-6)


@pytest.mark.parametrize('full', [False, True])
def test_num_classes_changed_replaces_classifier(tmp_path, full):
    model = small()
    state_dict = model.state_dict()
    if full:
        state_dict['head.fc.weight'] = unfold_symmetric_weight(state_dict['head.fc.weight'])
    path = save(tmp_path / 'own.pt', state_dict)
    loaded = load('bcnn', path, num_classes=5, **SMALL)
    assert loaded.get_classifier().weight.shape == (5, 136)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(loaded.forward_features(x), model.forward_features(x))
        assert torch.equal(loaded.head.proj_a.weight, model.head.proj_a.weight)
        assert loaded(x).shape == (2, 5)


def test_num_classes_zero(tmp_path):
    model = small()
    loaded = load('bcnn', save(tmp_path / 'own.pt', model.state_dict()), num_classes=0, **SMALL)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_in_chans_adapted(tmp_path):
    model = small()
    loaded = load('bcnn', save(tmp_path / 'own.pt', model.state_dict()), in_chans=1, **SMALL)
    torch.testing.assert_close(stream_convs(loaded, 'a')[0], stream_convs(model, 'a')[0].sum(1, keepdim=True))
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_wrong_backbone_names_keys_and_shapes(tmp_path):
    path = save(tmp_path / 'own.pt', small().state_dict())
    with pytest.raises(RuntimeError, match='does not fit') as e:
        load('bcnn', path, backbone_a='test_convnext', proj_dim=16)
    assert re.search(r'stream_a\.\S+ is missing', str(e.value))
    assert len(str(e.value)) < 2000  # the first few keys, not hundreds


def test_wrong_shape_names_key_and_both_shapes(tmp_path):
    model = small()
    path = save(tmp_path / 'own.pt', model.state_dict())
    with pytest.raises(RuntimeError) as e:
        load('bcnn', path, backbone_a='test_resnet', proj_dim=8)
    assert 'head.proj_a.weight is (16, 96, 1, 1), the model has (8, 96, 1, 1)' in str(e.value)
    assert f'head.fc.weight is ({NUM_CLASSES}, 136), the model has ({NUM_CLASSES}, 36)' in str(e.value)


def test_extra_key_is_named(tmp_path):
    state_dict = dict(small().state_dict(), **{'head.extra.weight': torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'head\.extra\.weight is not in the model'):
        load('bcnn', save(tmp_path / 'own.pt', state_dict), **SMALL)


def test_missing_classifier_is_named(tmp_path):
    state_dict = {k: v for k, v in small().state_dict().items() if k != 'head.fc.bias'}
    with pytest.raises(RuntimeError, match=r'head\.fc\.bias is missing'):
        load('bcnn', save(tmp_path / 'own.pt', state_dict), **SMALL)


@pytest.mark.parametrize('checkpoint_classes', [1000, NUM_CLASSES + 1])
def test_wrong_class_count_is_explained(tmp_path, checkpoint_classes):
    # The model has as many classes as the config says, the file another number.
    path = save(tmp_path / 'own.pt', small().state_dict())
    with pytest.raises(RuntimeError) as e:
        load('bcnn', path, num_classes=checkpoint_classes, checkpoint_classes=checkpoint_classes, **SMALL)
    message = str(e.value)
    assert f'head.fc.weight is ({NUM_CLASSES}, 136), the model has ({checkpoint_classes}, 136)' in message
    assert f'taken to have {checkpoint_classes} classes' in message and 'num_classes=' in message
