"""Checkpoints of others and our own, and weights from the Hub's cache. No network."""

import gc
import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import timm_bilinear  # registers the models
import timm_bilinear.pretrained
from timm_bilinear.ops import fold_symmetric_weight, unfold_symmetric_weight

NUM_CLASSES = 14


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # the client's own switch: no test reaches for the network
    torch.manual_seed(0)
    yield
    gc.collect()


def randomise_norms(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters that tell one batch norm from another, so that a mixed-up key shows."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


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


def stream_convs(model, letter):
    """Conv weights of a stream in order; timm's feature nets rename, but keep the order."""
    stream = getattr(model, f'stream_{letter}')
    return [m.weight for m in stream.modules() if isinstance(m, nn.Conv2d)]


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


# --- the Hub: errors and cache


def put_in_cache(cache_dir, backbone, state_dict):
    """A repo as the Hub's client leaves it in its cache."""
    repo = cache_dir / ('models--' + timm.get_pretrained_cfg(backbone).hf_hub_id.replace('/', '--'))
    snapshot = repo / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    safetensors.torch.save_file(state_dict, snapshot / 'model.safetensors')


def hub_response(status):
    request = SimpleNamespace(method='GET', url='https://example.invalid')
    return SimpleNamespace(headers={}, status_code=status, request=request, url=request.url)


@pytest.mark.parametrize(
    'name,kwargs,repo',
    [
        ('bcnn_resnet18', {}, 'timm/resnet18.a1_in1k'),
        ('bcnn', dict(backbone_a='resnet18.tv_in1k'), 'timm/resnet18.tv_in1k'),
        ('bcnn', dict(backbone_a='test_resnet', backbone_b='test_convnext'), 'timm/test_resnet.r160_in1k'),
    ],
)
@pytest.mark.parametrize(
    'error,cause',
    [
        (LocalEntryNotFoundError('cannot find the requested file in the local cache'), 'not in the cache'),
        (RepositoryNotFoundError('404 Client Error\n\nRequest ID', response=hub_response(404)), '404 Client Error'),
        (ConnectionError('connection refused'), 'connection refused'),
    ],
    ids=['offline', 'no_repo', 'no_connection'],
)
def test_no_network_is_one_sentence(monkeypatch, name, kwargs, repo, error, cause):
    def hf_hub_download(*_, **__):
        raise error

    monkeypatch.setattr(timm_bilinear.pretrained, 'hf_hub_download', hf_hub_download)
    with pytest.raises(RuntimeError) as e:
        timm.create_model(name, pretrained=True, num_classes=3, **kwargs)
    for part in (f"'{repo}'", 'model.safetensors', cause, 'HF_HUB_OFFLINE', 'HF_ENDPOINT', 'pretrained=False'):
        assert part in str(e.value)
    assert '\n' not in str(e.value)


def test_second_streams_repo_is_named(tmp_path):
    put_in_cache(tmp_path, 'test_resnet', timm.create_model('test_resnet').state_dict())
    with pytest.raises(RuntimeError, match=r"'timm/test_convnext\.r160_in1k'"):
        timm.create_model(
            'bcnn', pretrained=True, backbone_a='test_resnet', backbone_b='test_convnext', cache_dir=tmp_path
        )


def test_backbone_without_weights(tmp_path):
    with pytest.raises(RuntimeError, match=r"no pretrained weights for 'test_vit4'.*pretrained=False"):
        timm.create_model('bcnn', pretrained=True, backbone_a='test_vit4', cache_dir=tmp_path)


def test_offline_without_cache(tmp_path):
    # The client's own offline error, not a stand-in.
    with pytest.raises(RuntimeError, match=r"'timm/test_resnet\.r160_in1k'.*HF_HUB_OFFLINE"):
        timm.create_model('bcnn', pretrained=True, backbone_a='test_resnet', cache_dir=tmp_path)


@pytest.mark.parametrize('features_only', [False, True])
def test_offline_from_cache(tmp_path, features_only):
    backbone = randomise_norms(timm.create_model('test_resnet'))
    put_in_cache(tmp_path, 'test_resnet', backbone.state_dict())
    model = timm.create_model(
        'bcnn',
        pretrained=True,
        backbone_a='test_resnet',
        num_classes=3,
        cache_dir=tmp_path,
        features_only=features_only,
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        features = model(x)[-1] if features_only else model.forward_features(x)
        torch.testing.assert_close(features, backbone.forward_features(x))


def test_offline_two_streams_get_their_own(tmp_path):
    backbones = [timm.create_model(name).eval() for name in ('test_resnet', 'test_convnext')]
    for name, backbone in zip(('test_resnet', 'test_convnext'), backbones):
        randomise_norms(backbone)
        put_in_cache(tmp_path, name, backbone.state_dict())
    model = timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', backbone_b='test_convnext', num_classes=3, cache_dir=tmp_path
    ).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        a, b = model.forward_features(x).split([96, 64], 1)
        torch.testing.assert_close(a, backbones[0].forward_features(x))
        # convnext's feature extractor ends before the model's final norm
        torch.testing.assert_close(b, backbones[1].stages(backbones[1].stem(x)))


def test_offline_tags_are_kept_apart(tmp_path):
    # Two tags of one architecture are two sets of weights.
    backbones = {}
    for tag in ('tv_in1k', 'a1_in1k'):
        backbones[tag] = randomise_norms(timm.create_model('resnet18'))
        put_in_cache(tmp_path, f'resnet18.{tag}', backbones[tag].state_dict())
    model = timm.create_model(
        'bcnn',
        pretrained=True,
        backbone_a='resnet18.tv_in1k',
        backbone_b='resnet18.a1_in1k',
        num_classes=3,
        proj_dim=8,
        cache_dir=tmp_path,
    )
    for letter, tag in (('a', 'tv_in1k'), ('b', 'a1_in1k')):
        assert torch.equal(stream_convs(model, letter)[0], backbones[tag].conv1.weight)


def test_offline_named_model(tmp_path):
    # The classifier is fresh: the backbone's own fc must be neither needed nor taken.
    backbone = randomise_norms(timm.create_model('resnet18'))
    put_in_cache(tmp_path, 'resnet18', backbone.state_dict())
    model = timm.create_model('bcnn_resnet18', pretrained=True, num_classes=3, cache_dir=tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(x), backbone.forward_features(x))
    assert model.get_classifier().weight.shape == (3, 512 * 513 // 2)


def test_offline_in_chans(tmp_path):
    backbone = timm.create_model('test_resnet')
    put_in_cache(tmp_path, 'test_resnet', backbone.state_dict())
    model = timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', num_classes=3, in_chans=1, cache_dir=tmp_path
    )
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(stream_convs(model, 'a')[0], first.weight.sum(1, keepdim=True))
