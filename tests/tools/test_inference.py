import json
import logging
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo, resolve_input_data_config
from torch import nn

from timm_bilinear.hub import save_model
from timm_bilinear.tools import inference
from timm_bilinear.tools.finetune import finetune
from timm_bilinear.tools.inference import (
    label_descriptions,
    label_names,
    load,
    predict_logits,
    resolve_amp_dtype,
    resolve_device,
    view_data_config,
    views,
)

CPU = torch.device('cpu')
NAMES = ['zebra', 'ant', 'é, ü']


def create(num_classes=3, name='bcnn', **kwargs):
    kwargs = dict(dict(backbone_a='test_resnet') if name == 'bcnn' else {}, **kwargs)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('models') / 'a model'
    return save_model(create(), root, NAMES, dict(input_size=(3, 64, 96), crop_pct=0.9, crop_mode='squash'))


def test_load_folder(folder):
    state = torch.random.get_rng_state()
    model = load(folder, 'cpu')
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training and label_names(model) == label_descriptions(model) == NAMES
    config = view_data_config(model)
    assert config['input_size'] == (3, 64, 96) and config['crop_pct'] == 0.9 and config['crop_mode'] == 'squash'
    for key, value in load_file(folder / 'model.safetensors').items():
        assert torch.equal(model.state_dict()[key], value), key
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('form', [str, lambda path: path, lambda path: f'local-dir:{path}'])
def test_ways_to_name_a_folder(folder, form):
    assert label_names(load(form(folder), 'cpu')) == NAMES


def test_a_folder_comes_before_a_registered_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, 'resnet18')
    assert label_names(load('resnet18', 'cpu')) == NAMES
    (tmp_path / 'resnet34').mkdir()  # of something else
    with pytest.raises(OSError, match=r"'resnet34'.*Hub"):
        load('resnet34', 'cpu')


def test_label_names_given(folder):
    assert label_names(load(folder, 'cpu', ['x', 'y', 'z'])) == ['x', 'y', 'z']
    with pytest.raises(ValueError, match=r"'label_names' must name 3 classes, got 2"):
        load(folder, 'cpu', ['x', 'y'])


@pytest.fixture
def registered(monkeypatch):
    """Registered models 'get' their weights without the Hub."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: create_model(name))


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet.r160_in1k'])
def test_imagenet_names(registered, name):
    model = load(name, 'cpu')
    info = ImageNetInfo('imagenet-1k')
    assert label_names(model) == list(info.label_names())  # as the folders of ImageNet are called
    assert label_descriptions(model) == info.label_descriptions()
    assert label_descriptions(model)[0] == 'tench, Tinca tinca'


def test_no_imagenet_names_for_other_models_of_1000_classes(tmp_path):
    save_model(create(1000), tmp_path / 'm')
    model = load(tmp_path / 'm', 'cpu')
    assert label_names(model) == label_descriptions(model) == [str(i) for i in range(1000)]


@pytest.mark.parametrize(
    'names, expected',
    [
        (['a', 'b', 'c'], ['a', 'b', 'c']),
        (('a', 1, 'c'), ['a', '1', 'c']),
        ({'2': 'c', '0': 'a', '1': 'b'}, ['a', 'b', 'c']),
        ({0: 'a', 2: 'c'}, ['a', '1', 'c']),  # timm allows gaps
        ({'c': 2, 'a': 0, 'b': 1}, ['a', 'b', 'c']),
        ({'3': 'd', '0': 'a'}, ['0', '1', '2']),
        ({'a': 'b'}, ['0', '1', '2']),
        (['a', 'b'], ['0', '1', '2']),
        (None, ['0', '1', '2']),
        ([], ['0', '1', '2']),
    ],
)
def test_label_names(names, expected, caplog):
    model = create()
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=names)
    assert label_names(model) == expected
    assert bool(caplog.records) == bool(names and expected == ['0', '1', '2'])


@pytest.mark.parametrize('described', [{'a': 'an ant', 'c': ''}, ['an ant', None, '']])
def test_label_descriptions(described):
    model = create()
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names=['a', 'b', 'c'], label_descriptions=described)
    assert label_names(model) == ['a', 'b', 'c'] and label_descriptions(model) == ['an ant', 'b', 'c']


def test_without_classes_or_config():
    assert label_names(create(0)) == []
    assert label_names(nn.Linear(2, 3)) == []


def test_a_module_is_used_as_it_is():
    model = create().train()
    assert load(model) is model and not model.training
    compiled = torch.compile(model, backend='eager')
    assert load(compiled, label_names=NAMES) is compiled and label_names(compiled) == NAMES


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of finetune, of one epoch."""
    root = tmp_path_factory.mktemp('run')
    for split in ('train', 'val'):
        for name, colour in (('red', 'red'), ('blue', 'blue')):
            (root / 'data' / split / name).mkdir(parents=True)
            for i in range(4):
                size = (48 + i, 50 + (split == 'val'))
                Image.new('RGB', size, colour).save(root / 'data' / split / name / f'{i}.png')
    settings = dict(model='bcnn', model_kwargs=dict(backbone_a='test_resnet'), pretrained=False, img_size=32)
    finetune(root / 'data', root / 'out', epochs=1, batch_size=4, workers=0, amp_dtype='float32', **settings)
    return root / 'out'


@pytest.mark.parametrize('name', ['', 'checkpoints/model_best.pth.tar', 'checkpoints/last.pth.tar'])
def test_what_finetune_leaves(run, name):
    model = load(run / name, 'cpu')
    assert label_names(model) == ['blue', 'red'] and view_data_config(model)['input_size'] == (3, 32, 32)
    state, stored = model.state_dict(), load_file(run / 'model.safetensors')
    assert state.keys() == stored.keys() and all(torch.equal(state[key], stored[key]) for key in stored)


def test_run_without_result_yet(run, tmp_path, caplog):
    shutil.copytree(run / 'checkpoints', tmp_path / 'out' / 'checkpoints')
    model = load(tmp_path / 'out', 'cpu')
    assert label_names(model) == ['blue', 'red'] and 'model_best.pth.tar' in caplog.text
    assert torch.equal(model.get_classifier().weight, load(run, 'cpu').get_classifier().weight)


def test_checkpoint_of_timms_script(tmp_path):
    model = create(name='test_resnet')
    torch.save(dict(state_dict=model.state_dict(), epoch=1, arch='test_resnet'), tmp_path / 'last.pth.tar')
    args = 'model: test_resnet\nnum_classes: 3\nimg_size: 64\ncrop_pct: 0.7\nmean: [0.1, 0.2, 0.3]\n'
    (tmp_path / 'args.yaml').write_text(args)
    loaded = load(tmp_path / 'last.pth.tar', 'cpu')
    config = view_data_config(loaded)
    assert config['input_size'] == (3, 64, 64) and config['crop_pct'] == 0.7 and config['mean'] == (0.1, 0.2, 0.3)
    assert torch.equal(loaded.get_classifier().weight, model.get_classifier().weight)
    assert label_names(load(tmp_path / 'last.pth.tar', 'cpu', NAMES)) == NAMES


def test_unfinished_run(folder, tmp_path, caplog):
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"'.*run' is no folder of a model"):
        load(tmp_path / 'run')
    torch.save(1, tmp_path / 'run' / 'checkpoints' / 'last.pth.tar')
    with pytest.raises(ValueError, match=r'last\.pth\.tar'):
        load(tmp_path / 'run')
    torch.save(1, tmp_path / 'run' / 'checkpoints' / 'model_best.pth.tar')
    with pytest.raises(ValueError, match=r'model_best\.pth\.tar'):
        load(tmp_path / 'run')
    assert 'has not ended' in caplog.text


@pytest.mark.parametrize(
    'name, error, message',
    [
        ('resnet1888', ValueError, "'resnet1888' is no folder.*'resnet18'"),
        ('bcnn_resnet_18', ValueError, 'bcnn_resnet18'),
        ('resnet18.nope', ValueError, "'resnet18' has no weights 'nope', but 'a1_in1k'"),
        ('bcnn_vgg16', ValueError, "'bcnn_vgg16' has weights for its streams, but none for its classifier"),
        ('bcnn_resnet18_c4', ValueError, "give 'bcnn_resnet18_c4.googlefonts378'"),
        ('test_byobnet', OSError, "'test_byobnet'.*Hub.*cache"),
        ('bcnn_resnet18_c4.googlefonts378', OSError, 'timm-bilinear/bcnn_resnet18_c4.googlefonts378'),
        ('botnet50ts_256', ValueError, "no pretrained weights for 'botnet50ts_256'"),
        ('hf-hub:nobody/nothing', OSError, "'hf-hub:nobody/nothing'.*Hub.*cache"),
        ('hf_hub:nobody/nothing', OSError, "'hf-hub:nobody/nothing'.*Hub.*cache"),
        ('hf-hub:nothing', ValueError, 'hf-hub:OWNER/NAME'),
        ('hf-hub:', ValueError, 'hf-hub:OWNER/NAME'),
        ('local-dir:nowhere', FileNotFoundError, "'nowhere'"),
        ('owner/name', ValueError, "'hf-hub:owner/name'"),
        ('./nowhere', FileNotFoundError, "'./nowhere'"),
        ('/no/where', FileNotFoundError, "'/no/where'"),
        ('last.pth.tar', FileNotFoundError, "'last.pth.tar'"),
        ('', ValueError, 'empty'),
    ],
)
def test_errors_name_the_thing(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as e:
        load(name, 'cpu')
    assert '\n' not in str(e.value) and 'pretrained=False' not in str(e.value)


def test_damaged_folders(folder, tmp_path):
    def damaged(name, change):
        copy = shutil.copytree(folder, tmp_path / name)
        change(copy)
        with pytest.raises((ValueError, OSError)) as e:
            load(copy, 'cpu')
        assert '\n' not in str(e.value) and str(copy) in str(e.value)
        return str(e.value)

    weights = (folder / 'model.safetensors').read_bytes()
    assert 'model.safetensors' in damaged('cut', lambda d: (d / 'model.safetensors').write_bytes(weights[:1000]))
    damaged('empty', lambda d: (d / 'model.safetensors').write_bytes(b''))
    assert 'no weights' in damaged('missing', lambda d: (d / 'model.safetensors').unlink())
    damaged('config', lambda d: (d / 'config.json').write_text('{'))
    config = json.loads((folder / 'config.json').read_text())
    damaged('other', lambda d: (d / 'config.json').write_text(json.dumps(dict(config, architecture='resnet1888'))))


def test_wrong_type():
    with pytest.raises(TypeError, match="'model' must be a name, a path or a module, got int"):
        load(3)


def test_device():
    assert resolve_device('cpu') == CPU
    with pytest.raises(ValueError, match="no device 'gpu'"):
        resolve_device('gpu')
    if not torch.cuda.is_available():
        assert resolve_device() == CPU
        with pytest.raises(ValueError, match="no device 'cuda'"):
            resolve_device('cuda')


@pytest.mark.parametrize('fast', [False, True])
def test_amp_dtype(monkeypatch, caplog, fast):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: fast, raising=False)
    monkeypatch.setattr(inference, 'bfloat16_pays', lambda: True)
    expected = torch.bfloat16 if fast else None
    assert resolve_amp_dtype('auto', CPU) is expected
    assert resolve_amp_dtype(None, CPU) is None and resolve_amp_dtype('float32', CPU) is None
    assert not caplog.records  # what was not asked for is not missed
    assert resolve_amp_dtype('bfloat16', CPU) is expected
    assert ('no bfloat16' in caplog.text) != fast
    assert resolve_amp_dtype('float16', CPU) is None and 'no float16' in caplog.text
    cuda = torch.device('cuda')
    assert resolve_amp_dtype('bfloat16', cuda) is torch.bfloat16
    assert resolve_amp_dtype('float16', cuda) is torch.float16
    with pytest.raises(ValueError, match=r"'amp' must be one of 'auto'.*'half'"):
        resolve_amp_dtype('half', CPU)


def test_bfloat16_where_it_takes_less_time(monkeypatch):
    """It may be there and take longer: then 'auto' leaves it, who asks for it gets it."""
    clock, turn = [0.0], {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True, raising=False)
    monkeypatch.setattr(inference.time, 'perf_counter', lambda: clock[0])
    conv2d = torch.nn.functional.conv2d

    def slow(x, *args, **kwargs):
        clock[0] += turn[x.dtype]
        return conv2d(x, *args, **kwargs)

    monkeypatch.setattr(inference.F, 'conv2d', slow)
    for seconds, expected in ((1.0, torch.bfloat16), (1.9, None), (4.0, None)):
        turn[torch.bfloat16] = seconds
        inference.bfloat16_pays.cache_clear()
        assert resolve_amp_dtype('auto', CPU) is expected
        assert resolve_amp_dtype('bfloat16', CPU) is torch.bfloat16
    inference.bfloat16_pays.cache_clear()


def test_views():
    images = torch.arange(2 * 3 * 8 * 10).view(2, 3, 8, 10)
    assert [v.tolist() for v in views(images, None)] == [images.tolist()]
    flipped = list(views(images, 'flip'))
    assert len(flipped) == 2 and torch.equal(flipped[1], torch.flip(images, [3]))
    # torchvision's five crops: corners, then centre
    from torchvision.transforms.functional import five_crop

    for size in ((6, 8), (5, 7), (8, 10)):
        for view, crop in zip(views(images, 'crops', size), five_crop(images, size)):
            assert torch.equal(view, crop)
    with pytest.raises(ValueError, match='too small'):
        list(views(images, 'crops', (9, 9)))


def test_config_of_views():
    model = create(name='test_resnet')
    assert view_data_config(model) == view_data_config(model, 'flip') == resolve_input_data_config(model)
    config = view_data_config(model, 'crops')
    assert config['input_size'] == (3, 182, 182) and config['crop_pct'] == 1.0
    with pytest.raises(ValueError, match="'tta' must be one of 'auto', 'none', 'flip', 'crops', 'scales', got 'ten'"):
        view_data_config(model, 'ten')


@pytest.mark.parametrize('tta, count', [(None, 1), ('flip', 2), ('crops', 5)])
@pytest.mark.parametrize('name', ['bcnn', 'test_vit'])
def test_logits_of_views_are_mean_probabilities(name, tta, count):
    model = create(name=name)
    nn.init.normal_(model.get_classifier().weight)
    config = view_data_config(model, tta)
    images = torch.randn(5, *config['input_size'])
    loader = [(images[:3], 'a'), (images[3:], 'b')]
    found = list(predict_logits(model, loader, CPU, tta=tta))
    assert [targets for _, targets in found] == ['a', 'b']
    found = torch.cat([logits for logits, _ in found])
    with torch.no_grad():
        size = resolve_input_data_config(model)['input_size'][1:]
        each = [model(view).softmax(-1) for view in views(images, tta, size)]
    assert len(each) == count and not found.requires_grad
    torch.testing.assert_close(found.softmax(-1), torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)
    if tta is None:
        torch.testing.assert_close(found, model(images).detach(), atol=1e-4, rtol=1e-4)


def test_logits_in_bfloat16():
    model = create()
    images = torch.randn(2, 3, 96, 96)
    ((expected, _),) = predict_logits(model, [(images, None)], CPU)
    ((found, _),) = predict_logits(model, [(images, None)], CPU, torch.bfloat16)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    ((half, _),) = predict_logits(model.bfloat16(), [(images, None)], CPU)  # weights that are in it
    assert half.dtype == torch.float32


def test_logger_is_quiet_about_a_good_model(folder, caplog):
    with caplog.at_level(logging.WARNING, inference.__name__.rpartition('.')[0]):
        label_names(load(folder, 'cpu'))
    assert not caplog.records
