"""Every registered name builds one network, however it is asked for, and is what it was when saved and loaded back."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from small_models import images, randomise_norms
from timm.data import resolve_input_data_config, resolve_model_data_config
from timm.models import get_deprecated_models, get_pretrained_cfg

from timm_bilinear import save_model
from timm_bilinear.models.bcnn import default_cfgs

pytestmark = pytest.mark.usefixtures('clean_up')

TAGGED = [f'{arch}.{tag}' for arch, cfg in sorted(default_cfgs.items()) for tag in cfg.tags if tag]
NAMES = sorted(default_cfgs) + TAGGED
FONTS = 'bcnn_resnet18_c4.googlefonts378'
PUBLISHED = Path(__file__).parents[2] / 'hub' / FONTS
# What a config says of the images, besides `resolve_model_data_config`, and of the classes.
CFG_KEYS = ('input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes')


def as_json(value):
    """Tuples are lists in config.json."""
    return json.loads(json.dumps(value))


def check_round_trip(model, folder):
    """Save a model, load it back and compare all that makes its answers."""
    model = randomise_norms(model)
    save_model(model, folder)
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    states = loaded.state_dict()
    assert list(states) == list(model.state_dict())
    assert all(torch.equal(states[key], value) for key, value in model.state_dict().items())
    # For the model's own number of channels, as timm saves it.
    assert as_json(resolve_model_data_config(loaded)) == as_json(resolve_input_data_config(model))
    assert loaded.levels == model.levels and loaded.head.pool_type == model.head.pool_type
    x = images(batch=1, chans=model.in_chans, size=64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    return loaded


def test_all_names_are_walked():
    listed = (timm.list_models(module='bcnn'), timm.list_models(module='bcnn', include_tags=True))
    assert set(NAMES) == {name for names in listed for name in names}
    assert FONTS in TAGGED


@pytest.mark.parametrize('name', NAMES)
def test_saved_and_loaded_back(tmp_path, name):
    model = timm.create_model(name, num_classes=3)
    loaded = check_round_trip(model, tmp_path / 'model')
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['architecture'] == name.partition('.')[0]
    # All that the tag's config sets is in the saved one and in the loaded model, but for the classes asked for.
    tag_cfg = dict(asdict(get_pretrained_cfg(name)), num_classes=3)
    for key in CFG_KEYS:
        assert key == 'num_classes' or model.pretrained_cfg[key] == tag_cfg[key], key
        assert config['pretrained_cfg'][key] == as_json(tag_cfg[key]), key
        assert as_json(loaded.pretrained_cfg[key]) == as_json(tag_cfg[key]), key


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=7, in_chans=1, proj_dim=16, pool_type='sum')])
def test_fine_tuned_from_a_tag(tmp_path, kwargs):
    # What is given when the model is made goes before what the tag says; the rest is the tag's, each time it is saved.
    model = timm.create_model(FONTS, **kwargs)
    assert model.num_classes == kwargs.get('num_classes', 378)
    loaded = check_round_trip(model, tmp_path / 'first')
    assert loaded.pretrained_cfg['input_size'] == (kwargs.get('in_chans', 3), 224, 224)
    tuned = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True, num_classes=5)
    assert check_round_trip(tuned, tmp_path / 'second').num_classes == 5


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(backbone_a='test_vit'),
        dict(backbone_a='test_vit', img_size=96),
        dict(backbone_a='test_resnet', backbone_b='test_vit'),
        dict(backbone_a='vgg11', out_index_a=2, proj_dim=16),
        dict(backbone_a='test_efficientnet', in_chans=1, proj_dim=16, out_index_a=-2),
        dict(backbone_a='resnet18', backbone_args=dict(output_stride=16), bn_eps=1e-3, proj_dim=16),
        dict(backbone_a='xception', proj_dim=16),
    ],
    ids=str,
)
def test_config_made_from_backbones(tmp_path, kwargs):
    model = timm.create_model('bcnn', num_classes=3, **kwargs).eval()
    backbone = kwargs['backbone_a']
    expected = get_pretrained_cfg(get_deprecated_models().get(backbone, backbone))
    save_model(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    config = resolve_model_data_config(loaded)
    assert as_json(config) == as_json(resolve_input_data_config(model))
    for key in ('mean', 'std', 'interpolation'):
        if model.in_chans == 3 or key == 'interpolation':
            assert as_json(loaded.pretrained_cfg[key]) == as_json(getattr(expected, key))
    x = torch.randn(1, model.in_chans, *(model._traits['img_size'] or (64, 64)))
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    'pretrained_cfg',
    [
        'googlefonts378',
        get_pretrained_cfg(FONTS),
        asdict(get_pretrained_cfg(FONTS)),
        get_pretrained_cfg(FONTS).to_dict(),
    ],
    ids=['tag', 'object', 'dict', 'short dict'],
)
def test_however_the_tag_is_given(pretrained_cfg):
    expected = timm.create_model(FONTS, device='meta')
    model = timm.create_model('bcnn_resnet18_c4', pretrained_cfg=pretrained_cfg, device='meta')
    assert repr(model) == repr(expected)
    assert model.pretrained_cfg == expected.pretrained_cfg
    assert model.num_classes == 378 and resolve_model_data_config(model)['input_size'] == (3, 224, 224)


def test_architecture_does_not_depend_on_the_tag():
    for name in TAGGED:
        tagged, plain = (timm.create_model(n, num_classes=3, device='meta') for n in (name, name.partition('.')[0]))
        assert repr(tagged) == repr(plain)


def test_config_of_bcnn_given_as_an_object():
    # It is what it says, not what the backbones say; but the registered one says nothing of them.
    registered = get_pretrained_cfg('bcnn')
    cfg = timm.create_model('bcnn', backbone_a='test_vit', device='meta').pretrained_cfg
    other = replace(registered, mean=(0.1, 0.2, 0.3))
    means = [(cfg, cfg['mean']), (registered, cfg['mean']), (asdict(registered), cfg['mean'])]
    for given, mean in (*means, (other, other.mean), (asdict(other), other.mean)):
        model = timm.create_model('bcnn', backbone_a='test_vit', pretrained_cfg=given, device='meta')
        assert model.pretrained_cfg['mean'] == mean


@pytest.mark.parametrize('arch', ['bcnn_resnet18', 'bcnn_vgg16', 'bcnn'])
@pytest.mark.parametrize('by', ['name', 'tag', 'object', 'dict'])
def test_tag_of_another_architecture_is_named(arch, by):
    cfg = dict(tag='googlefonts378', object=get_pretrained_cfg(FONTS), dict=asdict(get_pretrained_cfg(FONTS))).get(by)
    name = f'{arch}.googlefonts378' if by == 'name' else arch
    with pytest.raises(RuntimeError, match='bcnn_resnet18_c4') as e:
        timm.create_model(name, pretrained_cfg=cfg)
    assert arch in str(e.value) and str(e.value).count('\n') == 0


def test_unknown_tag():
    with pytest.raises(RuntimeError, match=r'no_such_tag.*bcnn_resnet18'):
        timm.create_model('bcnn_resnet18.no_such_tag')


def test_published_folder_is_the_tag():
    config = json.loads((PUBLISHED / 'config.json').read_text())
    assert config['architecture'] == 'bcnn_resnet18_c4' and 'out_index_a' not in config['model_args']
    loaded = timm.create_model(f'local-dir:{PUBLISHED}', pretrained=True)
    tagged = timm.create_model(FONTS)
    assert repr(loaded) == repr(tagged) and loaded.state_dict().keys() == tagged.state_dict().keys()


def test_folder_of_the_old_form(tmp_path):
    # Before the network had a name of its own, it was bcnn_resnet18 with an argument.
    (tmp_path / 'model.safetensors').symlink_to(PUBLISHED / 'model.safetensors')
    config = json.loads((PUBLISHED / 'config.json').read_text())
    config['architecture'] = 'bcnn_resnet18'
    config['model_args']['out_index_a'] = 3
    (tmp_path / 'config.json').write_text(json.dumps(config))
    old = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    new = timm.create_model(f'local-dir:{PUBLISHED}', pretrained=True).eval()
    x = images(batch=1, size=64)
    with torch.inference_mode():
        assert torch.equal(old(x), new(x))
    check_round_trip(old, tmp_path / 'again')
