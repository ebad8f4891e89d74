"""What a run trains: models of fixed input size, weights from files, and the save that is tried before training."""

import errno
import io
import pickle

import pytest
import timm
import torch
from finetune_cases import MODEL, SMALL, make_images
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from timm_bilinear.hub import save_model
from timm_bilinear.tools import session
from timm_bilinear.tools.finetune import finetune
from timm_bilinear.tools.network import create_network, describe_network, rebuild_network, try_out
from timm_bilinear.tools.settings import Settings
from timm_bilinear.tools.training import ImageStage

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.0)
FIXED = [
    ('test_vit', None),
    ('bcnn', dict(backbone_a='test_vit')),
    ('bcnn', dict(backbone_a='xcit_nano_12_p8_224')),
    ('bcnn', dict(backbone_a='test_vit', backbone_b='test_resnet')),
    ('vit_tiny_patch16_224', None),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'), (4, 2))


def _network(num_classes=2, **given):
    return create_network(Settings.of(dict(dict(MODEL, pretrained=False), **given)), num_classes)


@pytest.mark.parametrize('model, model_kwargs', FIXED)
def test_fixed_sizes(data, tmp_path, model, model_kwargs):
    """The size asked for reaches the model, and what is saved has it."""
    kwargs = dict(SMALL, model=model, model_kwargs=model_kwargs, img_size=96, batch_size=4, epochs=1)
    finetune(data, tmp_path / 'out', **kwargs)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
    assert timm.data.resolve_input_data_config(loaded)['input_size'] == (3, 96, 96)
    with torch.no_grad():
        checkpoint = torch.load(tmp_path / 'out' / 'checkpoints' / 'last.pth.tar', weights_only=True)
        assert rebuild_network(checkpoint).eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(model='vit_tiny_patch16_224', model_kwargs=None, train_size=64), 'does not take images of 64 x 64'),
        (dict(model='bcnn', model_kwargs=dict(backbone_a='vit_tiny_patch16_224'), train_size=64), 'images of 64 x 64'),
        (dict(model='test_resnet', model_kwargs=dict(proj_dim=8)), 'proj_dim'),
        (dict(model='bcnn', model_kwargs=dict(backbone_a='test_resnet', proj_dim='abc')), 'proj_dim'),
        (dict(model_kwargs=dict(num_classes=3)), "'model_kwargs' must not have 'num_classes'"),
        (dict(model='bcnn_resnet99', model_kwargs=None), "'model': timm has no model 'bcnn_resnet99'"),
        (dict(model='local-dir:nowhere', model_kwargs=None), 'nowhere'),
        (dict(opt='sdg'), "'opt': 'sdg' cannot be had .*close to it are sgd"),
        (dict(opt='fusedsgd'), "'opt': 'fusedsgd' cannot be had"),
        (dict(weights='nowhere.pth'), "'weights': there is no file 'nowhere.pth'"),
    ],
)
def test_refused_before_training(data, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(ImageStage, 'train_epoch', lambda *_: pytest.fail('trained'))
    kwargs = dict(SMALL, **{'img_size': 96, 'batch_size': 4})
    with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError), match=message) as e:
        finetune(data, tmp_path / 'out', **dict(kwargs, **given))
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(model='bcnn_resnet99'), "'model'"),
        (dict(weights='nowhere'), "'weights'"),
        (dict(opt='sdg'), "'opt'"),
        (dict(train_aug=dict(auto_augment='foo')), "'auto_augment': timm takes no 'foo' .*rand-"),
        (dict(train_aug=dict(auto_augment='rand-q3')), "'auto_augment'"),
        (dict(train_aug=dict(auto_augment='rand-mx9')), "'auto_augment'"),
        (dict(train_aug=dict(color_jitter=(0.1, 0.1, 0.1, 0.9))), "'color_jitter'"),
    ],
)
def test_arguments_are_checked_before_images(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(session, 'create_datasets', lambda *_, **__: pytest.fail('read images'))
    with pytest.raises((FileNotFoundError, RuntimeError, ValueError), match=message) as e:
        finetune(tmp_path, tmp_path / 'out', **dict(SMALL, **given))
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


def test_a_save_is_tried_before_training(data, tmp_path, monkeypatch):
    """What would fail after the last epoch fails before the first."""
    monkeypatch.setattr(ImageStage, 'train_epoch', lambda *_: pytest.fail('trained'))

    def fail(*_):
        raise OSError("Could not save the model to '/a/b': Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr('timm_bilinear.tools.network.save_model', fail)
        with pytest.raises(OSError, match=r"'.*out' cannot hold the model: read-only file system; take another"):
            finetune(data, tmp_path / 'out', **SMALL)
    assert not (tmp_path / 'out').exists()

    create_model = timm.create_model

    def other(name, **kwargs):
        net = create_model(name, **kwargs)
        if name.startswith('local-dir:'):
            with torch.no_grad():
                net.head.fc.weight.add_(1)
        return net

    monkeypatch.setattr('timm_bilinear.tools.network.timm.create_model', other)
    with pytest.raises(RuntimeError, match='what is loaded back computes something else'):
        finetune(data, tmp_path / 'out', **SMALL)
    assert not (tmp_path / 'out').exists()


def test_everything_is_written_below_the_output(data, tmp_path, monkeypatch):
    """As an output must be that is a mount point, or whose parent is read-only."""
    real = tmp_path / 'other' / 'disk'
    real.mkdir(parents=True)
    (tmp_path / 'link').symlink_to(real)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path, tmp_path / 'other')}
    finetune(data, tmp_path / 'link', **dict(SMALL, epochs=1))
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing was made or renamed beside it
    assert (tmp_path / 'link').is_symlink() and (real / 'model.safetensors').is_file()


def test_the_trial_leaves_nothing(tmp_path):
    net, _ = _network()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    before = torch.get_rng_state()
    try_out(net, tmp_path / 'trial', ['a', 'b'], CONFIG, train_size=24)
    assert net.training and not (tmp_path / 'trial').exists() and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def _saved(tmp_path, net, kind):
    path = tmp_path / f'weights.{"safetensors" if kind == "safetensors" else "pth.tar"}'
    if kind == 'safetensors':
        save_file(net.state_dict(), path)
    elif kind == 'folder':
        save_model(net, tmp_path / 'saved')
        path = tmp_path / 'saved' / 'model.safetensors'
    else:
        state = {f'module.{k}': v for k, v in net.state_dict().items()}
        torch.save(dict(state_dict={}, state_dict_ema=state) if kind == 'ema' else net.state_dict(), path)
    return path


@pytest.mark.parametrize('kind', ['safetensors', 'plain', 'ema', 'folder'])
@pytest.mark.parametrize('classes', [2, 5])
@pytest.mark.parametrize('model', ['bcnn', 'test_resnet'])
def test_weights(tmp_path, model, classes, kind):
    """All weights are those of the file; a classifier of another size is fresh."""
    kwargs = MODEL['model_kwargs'] if model == 'bcnn' else {}
    start = timm.create_model(model, num_classes=classes, **kwargs)
    net, _ = _network(model=model, model_kwargs=kwargs, weights=_saved(tmp_path, start, kind))
    classifier = net.pretrained_cfg['classifier']
    for key, value in start.state_dict().items():
        if not key.startswith(classifier) or classes == 2:
            assert torch.equal(net.state_dict()[key], value), key
    assert net.get_classifier().out_features == 2 and not net.pretrained_cfg.get('file')


@pytest.mark.parametrize(
    'model, model_kwargs',
    [
        ('bcnn', dict(backbone_a='test_resnet', pool_type='lowrank', proj_dim=16)),  # classes x channels x rank
        ('resnetv2_50d_gn', None),  # a 1x1 convolution
    ],
    ids=['lowrank', 'convolution'],
)
@pytest.mark.parametrize('classes', [2, 5])
def test_weights_with_other_classifiers(tmp_path, model, model_kwargs, classes):
    start = timm.create_model(model, num_classes=classes, **model_kwargs or {})
    torch.save(start.state_dict(), tmp_path / 'weights.pth')
    net, _ = _network(model=model, model_kwargs=model_kwargs, weights=tmp_path / 'weights.pth')
    for key, value in start.state_dict().items():
        if not key.startswith('head.fc.') or classes == 2:
            assert torch.equal(net.state_dict()[key], value), key


def test_another_pooling_than_that_of_the_weights(tmp_path):
    """Of a saved model and of a file: it is trained, and what a checkpoint says of the model is true."""
    start = timm.create_model('bcnn', num_classes=5, backbone_a='test_resnet', pool_type='sketch', dim=32)
    folder = save_model(start, tmp_path / 'saved')
    for given in (
        dict(model=f'local-dir:{folder}', model_kwargs=dict(pool_type='moments', dim=16), pretrained=True),
        dict(
            model_kwargs=dict(backbone_a='test_resnet', pool_type='moments', dim=16),
            weights=_saved(tmp_path, start, 'plain'),
        ),
    ):
        net, args = _network(**given)
        assert net.head.pool_type == 'moments' and net.head.pool.heads * net.head.pool.head_dim == 16
        weights = net.stream_a.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in start.stream_a.state_dict().items())
        again = rebuild_network(dict(describe_network(net, args), state_dict=net.state_dict()))
        assert again.head.pool_type == 'moments'


def test_weights_of_finetune(data, tmp_path):
    finetune(data, tmp_path / 'out', **dict(SMALL, epochs=1))
    path = tmp_path / 'out' / 'checkpoints' / 'last.pth.tar'
    net, _ = _network(num_classes=7, weights=path)
    state = torch.load(path, weights_only=True)['state_dict']
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items() if not k.startswith('head.fc'))


def test_weights_for_a_saved_model(tmp_path):
    """The file is taken, not what the folder has."""
    for name, seed in (('a', 0), ('b', 1)):
        torch.manual_seed(seed)
        save_model(timm.create_model('bcnn', num_classes=2, **MODEL['model_kwargs']), tmp_path / name)
    file = tmp_path / 'b' / 'model.safetensors'
    net, _ = _network(model=f'local-dir:{tmp_path / "a"}', model_kwargs=None, weights=file)
    loaded = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())


def _bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    'name, content, reason',
    [
        ('a.pth', b'', 'it is empty'),
        ('a.safetensors', b'', 'it is empty'),
        ('a.pth', b'hello', 'no file of torch.save'),
        ('a.pth', b'<!DOCTYPE html><html>', 'no file of torch.save'),
        ('a.pth', b'a,b\n1,2\n', 'no file of torch.save'),
        ('a.pth', save(dict(a=torch.zeros(9))), 'those of safetensors end in .safetensors'),
        ('a.safetensors', b'hello', 'cut off, or no file of safetensors'),
        ('a.safetensors', save(dict(a=torch.zeros(9)))[:-3], 'cut off, or no file of safetensors'),
        ('a.safetensors', save({}), 'it holds no tensors by name'),
        ('a.pth', _bytes(dict(a=torch.zeros(999)))[:1000], 'it is cut off'),
        ('a.pth', pickle.dumps([1, 2]), 'holds no tensors by name'),
        ('a.pth', _bytes([1, 2]), 'it holds no tensors by name'),
        ('a.pth', _bytes(torch.zeros(3)), 'it holds no tensors by name'),
        ('a.pth', _bytes({}), 'it holds no tensors by name'),
        ('a.pth', _bytes(dict(state_dict={})), 'it holds no tensors by name'),
        ('a.pth', _bytes(dict(epoch=1)), 'it holds no tensors by name'),
        ('a.pth', _bytes(torch.nn.Linear(2, 2)), r'more than tensors \(torch.nn.modules.linear.Linear\)'),
    ],
    ids=[str(i) for i in range(17)],
)
@pytest.mark.parametrize('model', ['bcnn', 'test_resnet'])
def test_damaged_weights(tmp_path, model, name, content, reason):
    (tmp_path / name).write_bytes(content)
    model_kwargs = MODEL['model_kwargs'] if model == 'bcnn' else None
    with pytest.raises(ValueError, match=rf"^'weights': '\S+' cannot be read as weights: .*{reason}.*\.$") as e:
        _network(model=model, model_kwargs=model_kwargs, weights=tmp_path / name)
    assert '\n' not in str(e.value) and 'weights_only' not in str(e.value)


@pytest.mark.parametrize('other', ['test_convnext', 'bcnn_resnet18', 'test_resnet', 'test_vit', 'one tensor'])
@pytest.mark.parametrize('model', ['bcnn', 'test_resnet', 'test_vit'])
def test_weights_that_do_not_fit(tmp_path, model, other):
    """timm alone would only log what is missing, and train from nothing."""
    if other == model:
        return
    start = {'a': torch.zeros(3)} if other == 'one tensor' else timm.create_model(other, num_classes=7).state_dict()
    torch.save(start, tmp_path / 'weights.pth')
    model_kwargs = MODEL['model_kwargs'] if model == 'bcnn' else None
    with pytest.raises(ValueError, match=rf"^'weights': '\S+' does not fit {model}: .*\.$") as e:
        _network(model=model, model_kwargs=model_kwargs, weights=tmp_path / 'weights.pth')
    assert '\n' not in str(e.value) and 'pretrained_cfg' not in str(e.value) and len(str(e.value)) < 900


@pytest.mark.parametrize('classes', [2, 7])
def test_a_classifier_that_does_not_fit(tmp_path, classes):
    """Of another model of the same streams."""
    start = timm.create_model('bcnn', num_classes=classes, **dict(MODEL['model_kwargs'], proj_dim=8))
    torch.save(start.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match=r"^'weights': '\S+' does not fit bcnn: ") as e:
        _network(weights=tmp_path / 'weights.pth')
    assert 'pretrained_cfg_overlay' not in str(e.value)


def test_a_model_that_cannot_be_made_is_not_the_fault_of_weights(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    with pytest.raises((ValueError, TypeError), match='proj_dim'):
        _network(model='test_resnet', model_kwargs=dict(proj_dim=8), weights=tmp_path / 'weights.pth')


@pytest.mark.parametrize(
    'error, told',
    [
        (OSError(errno.ENOSPC, 'No space left on device'), 'no space left; make room or take another --output'),
        (SafetensorError('I/O error: No space left on device (os error 28)'), 'no space left; make room or take'),
        (RuntimeError('[enforce fail] write failed: No space left on device'), 'no space left; make room or take'),
        (OSError(errno.EROFS, 'Read-only file system'), 'read-only file system; take another --output'),
        (SafetensorError('I/O error: Permission denied (os error 13)'), 'permission denied; take another --output'),
    ],
)
def test_no_room_for_the_model(data, tmp_path, monkeypatch, error, told):
    """Said before the first epoch, as a run that has none cannot be resumed."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr('timm_bilinear.hub.save.save_for_hf', fail)
    with pytest.raises(OSError) as e:
        finetune(data, tmp_path / 'out', **SMALL)
    assert str(e.value).startswith(f"'{tmp_path / 'out'}' cannot hold the model: {told}") and 'rror' not in str(e.value)
    assert not (tmp_path / 'out').exists()


def test_rebuilt_as_it_was(tmp_path):
    """Drop rates, which timm leaves out of what it saves, count in training."""
    kwargs = dict(MODEL['model_kwargs'], drop_rate=0.3, pool_type='sum')
    net, args = _network(model_kwargs=kwargs, img_size=48)
    facts = dict(describe_network(net, args), state_dict=net.state_dict())
    torch.save(facts, tmp_path / 'x')
    again = rebuild_network(torch.load(tmp_path / 'x', weights_only=True))
    assert again.drop_rate == 0.3 and str(again) == str(net)
    assert again.pretrained_cfg == net.pretrained_cfg
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_other_sizes_of_a_saved_model(data, tmp_path):
    """A model that was trained at one size is fine-tuned at another."""
    finetune(data, tmp_path / 'a', **dict(SMALL, epochs=1))
    again = dict(SMALL, model=f'local-dir:{tmp_path / "a"}', model_kwargs=None, img_size=48, epochs=1)
    finetune(data, tmp_path / 'b', **again)
    model = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)
    assert model.pretrained_cfg['input_size'] == (3, 48, 48)
