"""The first stage on kept descriptors, against the same steps on the weight itself and against training on images."""

import copy
import errno
import io
import json
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from timm_bilinear.data.folder import create_datasets
from timm_bilinear.models import BilinearCNN
from timm_bilinear.tools import frozen_stages
from timm_bilinear.tools.frozen import FeatureError, FrozenStage
from timm_bilinear.tools.frozen_stages import DescriptorStage, GramStage, MapStage, create_frozen_stage, no_cache_reason
from timm_bilinear.tools.recipe import Stage

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)
SGD = Stage(5, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 9), ('val', 5)):
        for i in range(3):
            folder = root / split / f'class{i}'
            folder.mkdir(parents=True)
            for j in range(count):
                noise = 60 * torch.rand(3, 32, 32, generator=generator)
                image = (noise + 60 * i).byte().permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(image).save(folder / f'{j}.png')
    return create_datasets(root).splits


def _net(**kwargs) -> BilinearCNN:
    torch.manual_seed(0)
    net = timm.create_model('bcnn', backbone_a='test_resnet', out_index_a=2, num_classes=3, img_size=32, **kwargs)
    net.set_freeze_backbone()
    return net


def _stage(datasets, folder, stage=SGD, net=None, **kwargs) -> FrozenStage:
    kwargs = dict(dict(batch_size=8, workers=0, seed=3), **kwargs)
    frozen = create_frozen_stage(net or _net(), stage, datasets, CONFIG, folder, **kwargs)
    frozen._prepare()
    return frozen


def _train(frozen, epochs):
    return [
        dict(frozen.train_epoch(epoch), **{f'val_{k}': v for k, v in frozen.evaluate().items()}) for epoch in epochs
    ]


class Reference:
    """SGD with Nesterov momentum on weight and bias, on the rows that the stage takes, written out."""

    def __init__(self, frozen):
        self.descriptors = torch.from_numpy(frozen.file.rows[:].astype('float64'))
        fc = frozen.net.head.fc
        self.params = [fc.weight.detach().double().clone(), fc.bias.detach().double().clone()]
        self.momentum = [None, None]

    def step(self, rows, targets, lr, smoothing, weights):
        weight, bias = (p.requires_grad_() for p in self.params)
        loss = F.cross_entropy(
            F.linear(self.descriptors[rows], weight, bias), targets, weights, label_smoothing=smoothing
        )
        with torch.no_grad():
            for i, grad in enumerate(torch.autograd.grad(loss, self.params)):
                self.momentum[i] = grad.clone() if self.momentum[i] is None else 0.9 * self.momentum[i] + grad
                self.params[i] = self.params[i] - lr * (grad + 0.9 * self.momentum[i])
        return loss.item()


@pytest.mark.parametrize('smoothing,weights', [(0.0, None), (0.1, [1.0, 0.5, 1.5])])
def test_coefficients_follow_the_weight(datasets, tmp_path, monkeypatch, smoothing, weights):
    """Training by the Gram matrix is SGD on the weight, step for step."""
    weights = None if weights is None else torch.tensor(weights)
    frozen = _stage(datasets, tmp_path, smoothing=smoothing, class_weights=weights)
    assert type(frozen) is GramStage
    reference, losses = Reference(frozen), []
    step = frozen._step

    def both(rows, targets):
        lr = frozen.optimizer.param_groups[0]['lr']
        expected = reference.step(rows, targets, lr, smoothing, None if weights is None else weights.double())
        losses.append((step(rows, targets), expected))
        return losses[-1][0]

    monkeypatch.setattr(frozen, '_step', both)
    _train(frozen, range(5))
    assert len(losses) == 5 * 3
    for (loss, _), expected in losses:
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    frozen.write_classifier()
    fc = frozen.net.head.fc
    torch.testing.assert_close(fc.weight.double(), reference.params[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fc.bias.double(), reference.params[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('opt,drop_rate', [('adamw', 0.0), ('sgd', 0.3)])
def test_other_steps_train_on_the_descriptors(datasets, tmp_path, opt, drop_rate):
    frozen = _stage(
        datasets, tmp_path, Stage(8, opt, 0.0, 0.05 if opt == 'adamw' else 1.0, 0.0), _net(drop_rate=drop_rate)
    )
    assert type(frozen) is DescriptorStage
    rows = _train(frozen, range(8))
    assert rows[-1]['val_top1'] > 90 and rows[-1]['loss'] < rows[0]['loss']


@pytest.mark.parametrize('rows', [7, 2048])
def test_both_ways_agree(datasets, tmp_path, monkeypatch, rows):
    """Also where the Gram matrix is computed in several blocks."""
    monkeypatch.setattr(frozen_stages, '_ROWS', rows)
    monkeypatch.setattr(frozen_stages, '_COLUMNS', 100)
    dual = _stage(datasets, tmp_path / 'a')
    monkeypatch.setattr(frozen_stages, '_GRAM_BYTES', 0)
    primal = _stage(datasets, tmp_path / 'b')
    assert type(dual) is GramStage and type(primal) is DescriptorStage
    for a, b in zip(_train(dual, range(5)), _train(primal, range(5))):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_maps_train_as_images_do(datasets, tmp_path, monkeypatch):
    """A head with a projection: the same steps as on the images themselves, each or its mirror image."""
    stage = Stage(5, 'sgd', lr=0.0, head_lr=0.1, weight_decay=0.0)  # small steps, which let rounding be
    frozen = _stage(datasets, tmp_path, stage, _net(proj_dim=8), smoothing=0.1)
    assert type(frozen) is MapStage
    net, losses, step = copy.deepcopy(frozen.net), [], frozen._step
    transform = timm.data.create_transform(**CONFIG, is_training=False)
    images = [transform(Image.open(path)) for path in datasets['train'].paths]
    params = [p for p in net.parameters() if p.requires_grad]
    assert len(params) == 3
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)

    def both(rows, targets):
        optimizer.param_groups[0]['lr'] = frozen.optimizer.param_groups[0]['lr']
        views = torch.stack([images[row // 2].flip(2) if row % 2 else images[row // 2] for row in rows.tolist()])
        loss = F.cross_entropy(net(views), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((step(rows, targets), loss.item()))
        return losses[-1][0]

    monkeypatch.setattr(frozen, '_step', both)
    rows = _train(frozen, range(5))
    for (loss, _), expected in losses:
        assert loss == pytest.approx(expected, rel=2e-3)
    assert rows[-1]['loss'] < rows[0]['loss']


@pytest.mark.parametrize('kwargs', [dict(), dict(proj_dim=8), dict(drop_rate=0.1)])
def test_snapshot_and_back(datasets, tmp_path, kwargs):
    """A checkpoint writes the best epoch into the model, then the last: training goes on from that."""
    frozen = _stage(datasets, tmp_path, net=_net(**kwargs))
    _train(frozen, range(2))
    best = frozen.snapshot()
    frozen.write_classifier()
    at_best = [v.clone() for v in frozen.net.head.state_dict().values()]
    _train(frozen, range(2, 4))
    now = frozen.evaluate()
    frozen.write_classifier(best)
    assert all(map(torch.equal, at_best, frozen.net.head.state_dict().values()))
    frozen.write_classifier()
    assert not torch.equal(at_best[-2], list(frozen.net.head.state_dict().values())[-2])
    assert frozen.evaluate() == now


def test_what_is_validated_is_what_the_model_says(datasets, tmp_path):
    frozen = _stage(datasets, tmp_path)
    rows = _train(frozen, range(5))
    streams = {k: v.clone() for k, v in frozen.net.state_dict().items() if k.startswith('stream_')}
    frozen.write_classifier()
    net = frozen.net.eval()
    transform = timm.data.create_transform(**CONFIG, is_training=False)
    val = datasets['val']
    with torch.no_grad():
        logits = net(torch.stack([transform(Image.open(path)) for path in val.paths]))
    targets = torch.tensor(val.targets)
    assert F.cross_entropy(logits, targets).item() == pytest.approx(rows[-1]['val_loss'], abs=2e-3)
    assert 100 * (logits.argmax(1) == targets).float().mean().item() == pytest.approx(rows[-1]['val_top1'])
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in streams.items())


def test_mirror_images(datasets, tmp_path):
    """Rows are the images and their mirror images, in turn; without flips the images alone."""
    both = _stage(datasets, tmp_path / 'both')
    alone = _stage(datasets, tmp_path / 'alone', hflip=0.0)
    train = len(datasets['train'])
    assert both.file.rows.shape[0] == alone.file.rows.shape[0] + train
    net = both.net.eval()
    transform = timm.data.create_transform(**CONFIG, is_training=False)
    for i in (0, 20):
        image = transform(Image.open(datasets['train'].paths[i])).unsqueeze(0)
        with torch.no_grad():
            for row, view in ((2 * i, image), (2 * i + 1, image.flip(3))):
                expected = net.forward_head(net.forward_features(view), pre_logits=True)[0]
                torch.testing.assert_close(both.file.read(row), expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(alone.file.read(i), both.file.read(2 * i), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('gram_bytes', [2**30, 0])
def test_resumed(datasets, tmp_path, monkeypatch, gram_bytes):
    """Cut after an epoch and begun anew from the same model: the same weights, bit for bit."""
    monkeypatch.setattr(frozen_stages, '_GRAM_BYTES', gram_bytes)
    whole = _stage(datasets, tmp_path / 'whole')
    _train(whole, range(5))
    whole.write_classifier()
    cut = _stage(datasets, tmp_path / 'cut')
    _train(cut, range(2))
    torch.save(cut.state_dict(), tmp_path / 'state.pth')
    cut.write_classifier()
    net = _net()
    net.load_state_dict(cut.net.state_dict())  # as of the checkpoint
    resumed = _stage(datasets, tmp_path / 'cut', net=net)
    resumed.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    _train(resumed, range(2, 5))
    resumed.write_classifier()
    assert torch.equal(whole.net.head.fc.weight, resumed.net.head.fc.weight)
    assert torch.equal(whole.net.head.fc.bias, resumed.net.head.fc.bias)


def test_interrupted_while_descriptors_are_made(datasets, tmp_path):
    """What has been written and told is not computed again, and nothing else is believed."""
    whole = _stage(datasets, tmp_path / 'whole')
    net, calls = _net(), []
    forward = net.forward_features

    def cut(images):
        calls.append(len(images))
        if len(calls) == 4:  # of the second batch
            raise KeyboardInterrupt
        return forward(images)

    net.forward_features = cut
    with pytest.raises(KeyboardInterrupt):
        _stage(datasets, tmp_path / 'cut', net=net)
    assert json.loads((tmp_path / 'cut' / 'descriptors.0.json').read_text())['done'] == {'train': 8}
    net, seen = _net(), []
    forward = net.forward_features
    net.forward_features = lambda images: (seen.append(len(images)), forward(images))[1]
    resumed = _stage(datasets, tmp_path / 'cut', net=net)
    assert sum(seen) == 2 * (len(datasets['train']) - 8) + len(datasets['val'])
    assert (whole.file.rows[:] == resumed.file.rows[:]).all()
    # those of other streams are of no use
    other = _net()
    with torch.no_grad():
        next(other.stream_a.parameters()).mul_(2)
    seen.clear()
    forward = other.forward_features
    other.forward_features = lambda images: (seen.append(len(images)), forward(images))[1]
    _stage(datasets, tmp_path / 'cut', net=other)
    assert sum(seen) == 2 * len(datasets['train']) + len(datasets['val'])


def test_removed_at_the_end(datasets, tmp_path):
    frozen = _stage(datasets, tmp_path / 'cache')
    frozen.close()
    assert not (tmp_path / 'cache').exists()


def test_not_finite(datasets, tmp_path):
    net = _net()
    with torch.no_grad():
        next(net.stream_a.parameters()).fill_(float('nan'))
    with pytest.raises(
        FeatureError, match=r"features are not finite in half precision, of '.*class0.0.png' or one of the 7"
    ):
        _stage(datasets, tmp_path, net=net)


@pytest.mark.parametrize(
    'net,budget,reason',
    [
        (_net, 1.0, None),
        (_net, 0.0, '--head-cache is 0'),
        (lambda: timm.create_model('test_resnet', num_classes=3), 1.0, 'no bilinear CNN'),
        (lambda: _net(pool_type=''), 1.0, 'no pooling'),
    ],
)
def test_reasons(datasets, tmp_path, net, budget, reason):
    found = no_cache_reason(net(), SGD, datasets, CONFIG, 0.5, budget, tmp_path / 'cache')
    assert (found is None) if reason is None else (reason in found)


def test_budget_is_that_of_the_file(datasets, tmp_path):
    size = _stage(datasets, tmp_path / 'cache').file.file.stat().st_size
    assert no_cache_reason(_net(), SGD, datasets, CONFIG, 0.5, 1.0001e-9 * size, tmp_path / 'cache') is None
    assert 'GB' in no_cache_reason(_net(), SGD, datasets, CONFIG, 0.5, 0.9999e-9 * size, tmp_path / 'cache')
    assert no_cache_reason(_net(), SGD, datasets, CONFIG, 0.0, 0.9999e-9 * size, tmp_path / 'cache') is None


def test_a_full_disk_is_seen_before(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('usage', (), dict(free=1000)))
    assert '0.0 GB left' in no_cache_reason(_net(), SGD, datasets, CONFIG, 0.5, 8.0, tmp_path / 'cache')


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"key": "x"', '{"key": null, "done": 3}'])
def test_damaged_progress_is_no_progress(datasets, tmp_path, text):
    whole = _stage(datasets, tmp_path / 'whole')
    _stage(datasets, tmp_path / 'cut')
    (tmp_path / 'cut' / 'descriptors.0.json').write_text(text)
    assert (_stage(datasets, tmp_path / 'cut').file.rows[:] == whole.file.rows[:]).all()


def test_a_disk_fills_up(datasets, tmp_path):
    """What is mapped into memory would kill the process."""

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    frozen = create_frozen_stage(_net(), SGD, datasets, CONFIG, tmp_path, batch_size=8, workers=0)
    frozen.file._writer = FullDisk(tmp_path / 'descriptors.bin', 'r+b')
    with pytest.raises(OSError, match=r"Cannot write '.*descriptors.bin': No space left on device; make room, or use"):
        frozen._prepare()
