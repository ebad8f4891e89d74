import copy
import errno
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import GRIDS, ONE, create, images
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_bilinear  # noqa: F401
from timm_bilinear.hub import push as hub
from timm_bilinear.hub import save as save_module


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = timm.create_model('bcnn', backbone_a='test_resnet', out_index_a=2, proj_dim=8, eps=1e-5, num_classes=3)
    return net.to(memory_format=torch.channels_last).eval()


def test_save_and_load(model, tmp_path):
    config = resolve_model_data_config(model, args=dict(input_size=(3, 96, 96)))
    hub.save_model(model, tmp_path / 'model', ['a', 'b', 'c'], config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model']
    assert sorted(p.name for p in (tmp_path / 'model').iterdir()) == ['config.json', 'model.safetensors']

    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    loaded = loaded.to(memory_format=torch.channels_last)  # as the model is, still
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.head.pool.eps == 1e-5
    assert loaded.pretrained_cfg['input_size'] == (3, 96, 96)
    assert list(loaded.pretrained_cfg['label_names']) == ['a', 'b', 'c']


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('No space left')])
def test_full_disk_leaves_nothing(model, tmp_path, monkeypatch, error):
    def save(model, directory, **kwargs):
        (directory / 'model.safetensors').write_bytes(b'half')
        raise error

    monkeypatch.setattr(save_module, 'save_for_hf', save)
    with pytest.raises(OSError, match='model'):
        hub.save_model(model, tmp_path / 'model')
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_model(model, tmp_path, monkeypatch):
    hub.save_model(model, tmp_path / 'model')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()}
    monkeypatch.setattr(save_module, 'save_for_hf', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        hub.save_model(model, tmp_path / 'model')
    assert {p.name: p.read_bytes() for p in (tmp_path / 'model').iterdir()} == before


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(ONE, eps=1e-3),
        dict(GRIDS, proj_dim=16, pool_type='max', in_chans=1),
        dict(backbone_a='test_vit', num_classes=5, img_size=96),
        dict(backbone_a='test_resnet', num_classes=0),
    ],
    ids=['one', 'two', 'fixed', 'headless'],
)
def test_save_for_hf(tmp_path, kwargs):
    model = create(**kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    x = images(chans=kwargs.get('in_chans', 3))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    # Without this a saved model would be fed otherwise than it was trained.
    config, loaded_config = resolve_model_data_config(model), resolve_model_data_config(loaded)
    for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct') if 'in_chans' not in kwargs else ():
        assert loaded_config[key] == config[key] or tuple(loaded_config[key]) == config[key], key


@pytest.mark.parametrize('kwargs', [ONE, dict(GRIDS, proj_dim=16)], ids=['one', 'two'])
def test_save_for_hf_other_classes(tmp_path, kwargs):
    model = create(**kwargs)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=9).eval()
    x = images()
    with torch.inference_mode():
        assert loaded(x).shape == (2, 9)
        assert torch.equal(loaded.forward_features(x), model.forward_features(x))
        loaded.reset_classifier(0)
        model.reset_classifier(0)
        assert torch.equal(loaded(x), model(x))


def test_save_for_hf_named_model(tmp_path):
    model = timm.create_model('bcnn_resnet18', num_classes=4).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_save_for_hf_after_reset(tmp_path):
    model = create(**ONE)
    model.reset_classifier(11)
    save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_push_half(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    full, half = (
        hub.push_to_hub(model, 'me/m', dry_run=tmp_path / name, half=name == 'half') for name in ('full', 'half')
    )
    stored = load_file(f'{half}/model.safetensors')
    loaded = timm.create_model(f'local-dir:{half}', pretrained=True).state_dict()
    for key, value in before.items():
        is_matrix = value.ndim > 1
        assert stored[key].dtype == (torch.float16 if is_matrix else value.dtype), key
        assert torch.equal(loaded[key], value.half().float() if is_matrix else value), key
        assert torch.equal(model.state_dict()[key], value), key
    assert all(torch.equal(value, before[key]) for key, value in load_file(f'{full}/model.safetensors').items())


def test_push_of_a_repo_sends_its_files(model, tmp_path):
    repo, copy = tmp_path / 'repo', tmp_path / 'copy'
    hub.push_to_hub(model, 'me/m', dry_run=repo, license='mit')
    (repo / 'README.md').write_text('my card ![](picture.png)')
    (repo / 'picture.png').write_bytes(b'png')
    hub.push_to_hub(repo, 'me/m', dry_run=copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in repo.iterdir()}
    assert len(list(copy.iterdir())) == 4
    with pytest.raises(ValueError, match=r'README\.md'):
        hub.push_to_hub(repo, 'me/m', dry_run=tmp_path / 'other', half=True)
    (repo / 'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'model\.safetensors'):
        hub.push_to_hub(repo, 'me/m', dry_run=tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


# --- the caller's model


def _state(model):
    """What of a model its owner would notice."""
    tensors = dict(model.named_parameters(), **dict(model.named_buffers()))
    return {
        'tensors': {k: (id(v), v.data_ptr(), v.stride(), v.dtype, v.requires_grad) for k, v in tensors.items()},
        'modules': {k: (id(m), m.training, len(m._forward_hooks), sorted(vars(m))) for k, m in model.named_modules()},
        'args': copy.deepcopy(model._model_args),
        'cfg': copy.deepcopy(model.pretrained_cfg),
        'frozen': getattr(model, 'freeze_backbone', None),
    }


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('push', [False, True])
@pytest.mark.parametrize('name,kwargs', [('bcnn', dict(backbone_a='test_resnet')), ('test_convnext', {})])
def test_the_model_is_left_as_it_is(tmp_path, push, half, name, kwargs):
    if name == 'bcnn':
        kwargs = dict(kwargs, freeze_backbone=True)
    model = timm.create_model(name, num_classes=3, **kwargs).to(memory_format=torch.channels_last).train()
    model.get_classifier().register_forward_hook(lambda *_: None)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    before = _state(model)
    if push:
        hub.push_to_hub(model, 'me/m', dry_run=tmp_path / 'm', half=half)
    else:
        hub.save_model(model, tmp_path / 'm', half=half)
    assert _state(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert 'freeze_backbone' not in json.loads((tmp_path / 'm' / 'config.json').read_text())['model_args']


def test_files_are_those_of_timm(model, tmp_path):
    hub.save_model(model, tmp_path / 'ours')
    save_for_hf(model.to(memory_format=torch.contiguous_format), tmp_path / 'timms', safe_serialization=True)
    for name in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'ours' / name).read_bytes() == (tmp_path / 'timms' / name).read_bytes()


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_tied_weights_are_each_stored(tmp_path, half, memory_format):
    model = timm.create_model('test_resnet', num_classes=3).to(memory_format=memory_format)
    by_shape = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = by_shape.setdefault(module.weight.shape, module.weight)
    assert len(by_shape) < sum(isinstance(module, nn.Conv2d) for module in model.modules())
    hub.push_to_hub(model, 'me/m', dry_run=tmp_path / 'm', half=half)
    loaded = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value.half().float() if half and value.ndim > 1 else value), key


@pytest.mark.parametrize(
    'value,shown', [(1e5, r'100000'), (-7e4, r'70000'), (float('inf'), 'inf'), (float('nan'), 'nan')]
)
@pytest.mark.parametrize('key', ['head.fc.weight', 'stream_a.conv1.0.weight'])
def test_half_precision_that_would_overflow(model, tmp_path, key, value, shown):
    with torch.no_grad():
        model.get_parameter(key)[0, 0] = value
    for save in (hub.save_model, lambda *args, **kwargs: hub.push_to_hub(model, 'me/m', dry_run=args[1], **kwargs)):
        with pytest.raises(ValueError, match=rf"the largest value of '{key}' is {shown}"):
            save(model, tmp_path / 'm', half=True)
        assert not list(tmp_path.iterdir())


def test_vectors_are_never_halved(model, tmp_path):
    with torch.no_grad():
        model.get_parameter('head.fc.bias')[0] = 1e5
    hub.push_to_hub(model, 'me/m', dry_run=tmp_path / 'm', half=True)
    assert load_file(tmp_path / 'm' / 'model.safetensors')['head.fc.bias'][0] == 1e5


# --- wrappers


WRAPPERS = {
    'compiled': torch.compile,
    'parallel': nn.DataParallel,
    'ema': ModelEma,
    'ema2': ModelEmaV2,
    'ema3': ModelEmaV3,
    'averaged': AveragedModel,
    'nested': lambda model: torch.compile(nn.DataParallel(AveragedModel(torch.compile(model)))),
    'ema of parallel': lambda model: ModelEmaV3(nn.DataParallel(model)),
}


@pytest.mark.parametrize('name', WRAPPERS)
@pytest.mark.parametrize('push', [False, True])
def test_wrappers_are_seen_through(model, tmp_path, name, push):
    wrapped = WRAPPERS[name](model)
    if push:
        hub.push_to_hub(wrapped, 'me/m', dry_run=tmp_path / 'm')
    else:
        hub.save_model(wrapped, tmp_path / 'm')
    stored = load_file(tmp_path / 'm' / 'model.safetensors')
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in stored.items())


def test_distributed_wrapper_is_seen_through(model, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        hub.save_model(nn.parallel.DistributedDataParallel(model), tmp_path / 'm')
    finally:
        torch.distributed.destroy_process_group()
    assert load_file(tmp_path / 'm' / 'model.safetensors').keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.DataParallel(nn.Linear(2, 2)),
        lambda: torch.compile(nn.Linear(2, 2)),
        lambda: timm.create_model('test_resnet', features_only=True),
        lambda: timm.create_model('bcnn', backbone_a='test_resnet', features_only=True),
        lambda: {'head.fc.weight': torch.ones(2, 2)},
        lambda: None,
        lambda: [1],
    ],
)
def test_what_timm_did_not_make(tmp_path, make):
    for save in (hub.save_model, lambda thing, folder: hub.push_to_hub(thing, 'me/m', dry_run=folder)):
        with pytest.raises(TypeError, match=r"'model' must be made by timm\.create_model") as e:
            save(make(), tmp_path / 'm')
        assert '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_save_model_of_a_path(tmp_path):
    with pytest.raises(TypeError, match='got str'):
        hub.save_model('model', tmp_path / 'm')


# --- channels


@pytest.mark.parametrize('in_chans', [1, 2, 4])
@pytest.mark.parametrize('name', ['bcnn', 'two', 'test_vit'])
def test_channels(tmp_path, in_chans, name):
    kwargs = dict(ONE, in_chans=in_chans) if name == 'bcnn' else dict(GRIDS, proj_dim=8, in_chans=in_chans)
    model = timm.create_model(name, num_classes=3, in_chans=in_chans) if name == 'test_vit' else create(**kwargs)
    for folder in (hub.save_model(model, tmp_path / 's'), hub.push_to_hub(model, 'me/m', dry_run=tmp_path / 'p')):
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        cfg = loaded.pretrained_cfg
        assert cfg['input_size'][0] == loaded.in_chans == in_chans
        assert len(cfg['mean']) == len(cfg['std']) == in_chans and len(set(cfg['mean'])) == 1
        config = resolve_model_data_config(loaded)
        image = timm.data.create_transform(**config)(Image.new({1: 'L', 2: 'LA', 4: 'RGBA'}[in_chans], (99, 99)))
        with torch.inference_mode():
            assert torch.equal(loaded(image[None]), model.eval()(image[None]))
        # and back to colours, as timm adapts them
        assert timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=3).in_chans == 3


def test_push_leaves_the_random_state(model, tmp_path):
    # A push in the middle of training must not change the run.
    before = torch.get_rng_state()
    hub.push_to_hub(model, 'me/m', dry_run=tmp_path / 'first')
    hub.push_to_hub(tmp_path / 'first', 'me/m', dry_run=tmp_path / 'second')
    assert torch.equal(torch.get_rng_state(), before)


def test_card_of_an_unpooled_timm_model_is_no_classifiers(tmp_path):
    plain = timm.create_model('test_convnext', global_pool='', num_classes=3)
    folder = hub.push_to_hub(plain, 'me/m', dry_run=tmp_path / 'm')
    with open(f'{folder}/README.md') as f:
        assert 'pipeline_tag: image-feature-extraction' in f.read()
