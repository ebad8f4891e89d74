"""The authors' checkpoints through hub/convert_umass.py; with UMASS_REPO, a checkout of theirs, from their own code."""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from small_models import randomise_norms
from test_pretrained import (
    AuthorsDenseNet,
    AuthorsNet,
    AuthorsResNet,
    AuthorsVGG,
    assert_same_logits,
    spread,
)

pytestmark = pytest.mark.usefixtures('clean_up')
SCRIPT = Path(__file__).parents[2] / 'hub' / 'convert_umass.py'
spec = importlib.util.spec_from_file_location('convert_umass', SCRIPT)
convert_umass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_umass)
models = torchvision.models


def save(net, path):
    """As their train.py saves it."""
    optimizer = torch.optim.Adam(net.fc.parameters())
    checkpoint = dict(itr=7, optimizer=optimizer.state_dict(), best_acc=torch.tensor(0.84, dtype=torch.float64))
    torch.save(dict(checkpoint, state_dict={f'module.{k}': v for k, v in net.state_dict().items()}), path)
    return path


@pytest.fixture
def convert(call_main):
    def call(*args, check=True):
        result = call_main(convert_umass.main, *args)
        assert not check or result.returncode == 0, result.stderr
        return result

    return call


@pytest.mark.parametrize(
    'name',
    (
        'vgg11 vgg13_bn vgg16 vgg16_bn vgg19 resnet18 resnet34 resnet50 resnet101 resnet152 densenet121 densenet169'
        ' densenet201 inception_v3'
    ).split(),
)
def test_backbone_of(name):
    with torch.device('meta'):
        net = getattr(models, name)(weights=None, **(dict(init_weights=False) if name == 'inception_v3' else {}))
    keys = list((net.features if name.startswith('vgg') else net).state_dict())
    assert convert_umass.backbone_of(keys) == name


@pytest.mark.parametrize(
    'streams,proj_dim,architecture',
    [
        (lambda: [AuthorsVGG()], 0, 'bcnn_vgg16'),
        (lambda: [AuthorsResNet(models.resnet34()), AuthorsResNet(models.resnet18())], 16, 'bcnn'),
        (lambda: [AuthorsDenseNet(models.densenet121())], 16, 'bcnn'),
    ],
    ids=['vgg', 'resnet34 resnet18', 'densenet'],
)
def test_logits(tmp_path, convert, streams, proj_dim, architecture):
    net = randomise_norms(AuthorsNet(*streams(), proj_dim=proj_dim))
    spread(net.fc)
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join(f'class {i}' for i in range(14)))
    convert(save(net, tmp_path / 'x.pth.tar'), tmp_path / 'out', '--label-names', labels, '--dataset', 'aircrafts')
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded.pretrained_cfg['architecture'] == architecture
    assert_same_logits(loaded, net, size=64)
    config = timm.data.resolve_model_data_config(loaded)
    assert config['input_size'] == (3, 448, 448) and (config['crop_pct'], config['crop_mode']) == (0.875, 'squash')
    assert loaded.pretrained_cfg['label_names'][13] == 'class 13'


def change(state_dict, **more):
    return dict(state_dict=dict(state_dict, **more))


@pytest.mark.parametrize(
    'make,said',
    [
        (lambda sd: change(sd, **{'m_sqrt.I': torch.eye(2)}), 'the matrix square root'),
        (lambda sd: change(sd, **{'pooling_fn.count_sketch.0.h': torch.ones(2)}), 'a tensor sketch'),
        (lambda sd: change(sd, **{'fc.0.weight': torch.ones(2)}), 'a bottleneck'),
        (lambda sd: dict(weights=sd), 'has no state_dict'),
        (lambda sd: dict(state_dict={'conv.weight': torch.ones(2)}), 'has no streams'),
        (lambda sd: change(sd, extra=torch.ones(2)), 'extra is not in the model'),
        (lambda sd: dict(state_dict={k: v for k, v in sd.items() if '.28.' not in k}), 'is not known'),
        (lambda sd: Path('x'), 'holds more than weights'),
    ],
    ids=['sqrt', 'sketch', 'bottleneck', 'no_state_dict', 'other', 'extra', 'short', 'pickle'],
)
def test_what_is_refused(tmp_path, convert, make, said):
    torch.save(make(AuthorsNet(AuthorsVGG()).state_dict()), tmp_path / 'x.pth.tar')
    result = convert(tmp_path / 'x.pth.tar', tmp_path / 'out', check=False)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()[-1:]
    assert line.startswith('convert_umass: error: ') and said in line, result.stderr
    assert not (tmp_path / 'out').exists()


def test_bad_arguments(tmp_path, convert):
    path = save(AuthorsNet(AuthorsVGG(), proj_dim=4), tmp_path / 'x.pth.tar')
    (tmp_path / 'labels.txt').write_text('one\ntwo')
    result = convert(path, tmp_path / 'out', '--label-names', tmp_path / 'labels.txt', check=False)
    assert "names 2 classes, '" in result.stderr and result.returncode == 1
    assert 'missing.pth.tar' in convert(tmp_path / 'missing.pth.tar', tmp_path / 'out', check=False).stderr
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine').touch()
    assert 'is not empty' in convert(path, tmp_path / 'out', check=False).stderr
    (tmp_path / 'text.pth.tar').write_text('hello')
    assert 'error' in convert(tmp_path / 'text.pth.tar', tmp_path / 'new', check=False).stderr


def untrained(make, pretrained):
    return make(weights=None)


@pytest.mark.skipif('UMASS_REPO' not in os.environ, reason='UMASS_REPO does not name a checkout of the authors release')
@pytest.mark.parametrize(
    'names,proj_dim', [(['vgg'], 0), (['vgg', 'vgg'], 0), (['densenet'], 32), (['resnet'], 32)], ids=str
)
def test_the_authors_code(tmp_path, convert, monkeypatch, names, proj_dim):
    for name in ('vgg16', 'resnet101', 'densenet201', 'inception_v3', 'alexnet'):
        monkeypatch.setattr(models, name, partial(untrained, getattr(models, name)))
    monkeypatch.syspath_prepend(os.environ['UMASS_REPO'])
    from BCNN import create_bcnn_model

    net = randomise_norms(create_bcnn_model(names, 14, proj_dim=proj_dim).eval())
    spread(net.fc)
    convert(save(net, tmp_path / 'x.pth.tar'), tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert_same_logits(loaded, net if len(names) == 1 else lambda x: net(x, x), size=96)
