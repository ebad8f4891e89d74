"""Recipes in hub/recipes: complete, sound, and taken by timm's train script where TIMM_REPO names a checkout."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image
from timm.data import create_transform
from timm.optim import create_optimizer_v2

import timm_bilinear  # noqa: F401
from timm_bilinear.data.prepare import COUNTS

RECIPES = Path(__file__).parents[2] / 'hub' / 'recipes'
BIRDS = ('001.Black_footed_Albatross', '002.Laysan_Albatross', '010.Red_winged_Blackbird')


def _recipe(name):
    return yaml.safe_load((RECIPES / f'{name}.yaml').read_text())


NAMES = [f'{d}_{m}_stage{s}' for d in COUNTS for m in ('bcnn_vgg16', 'bcnn_resnet50') for s in (1, 2)]


def test_recipes_are_complete():
    assert sorted(path.stem for path in RECIPES.glob('*.yaml')) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_recipe_values(name):
    recipe = _recipe(name)
    dataset, model, stage = name.split('_', 1)[0], name[name.index('bcnn') :].rsplit('_', 1)[0], name[-1]
    assert (recipe['experiment'], recipe['model']) == (name, model)
    assert recipe['num_classes'] == COUNTS[dataset]['classes'] and recipe['img_size'] == 448
    assert recipe['model_kwargs'].get('freeze_backbone', False) is (stage == '1')
    assert recipe.get('pretrained', False) is (stage == '1')
    assert recipe['batch_size'] * recipe['grad_accum_steps'] == (256 if stage == '1' else 128)
    for key in ('lr', 'weight_decay', 'opt_eps', 'layer_decay'):  # YAML 1.1 reads 1e-5 as a string
        assert isinstance(recipe.get(key, 0.0), float)
    assert isinstance(recipe['model_kwargs']['eps'], float)


@pytest.mark.parametrize('model, rates', [('bcnn_vgg16', (1e-4, 1e-2)), ('bcnn_resnet50', (1e-3, 1e-2))])
def test_recipe_learning_rates(model, rates):
    recipe = _recipe(f'cub200_{model}_stage2')
    net = timm.create_model(model, num_classes=2)
    keys = ('opt', 'lr', 'layer_decay', 'layer_decay_min_scale')
    groups = create_optimizer_v2(net, **{key: recipe[key] for key in keys}).param_groups
    found = {id(p): group['lr'] * group['lr_scale'] for group in groups for p in group['params']}
    for name, param in net.named_parameters():
        assert found[id(param)] == pytest.approx(rates[name.startswith('head.')])


@pytest.mark.parametrize('dataset, width, height', [('cub200', 2 / 3, 1), ('aircraft', 0.875, 0.875), ('cars', 1, 1)])
def test_recipe_crops(dataset, width, height):
    """Of a 3:2 photograph, a training image shows these parts of its width and height."""
    recipe = _recipe(f'{dataset}_bcnn_vgg16_stage1')
    keys = ('train_crop_mode', 'scale', 'ratio', 'color_jitter')
    transform = create_transform(
        (3, 448, 448),
        is_training=True,
        interpolation=recipe['train_interpolation'],
        hflip=0.0,
        normalize=False,
        **{key: recipe[key] for key in keys},
    )
    ramps = [Image.linear_gradient('L').resize((900, 600)), Image.linear_gradient('L').rotate(90).resize((900, 600))]
    for _ in range(5):
        x = transform(Image.merge('RGB', (*ramps, ramps[0]))).float()
        assert x.shape == (3, 448, 448)
        spans = [(x[1].amax() - x[1].amin()).item() / 255, (x[0].amax() - x[0].amin()).item() / 255]
        assert spans == pytest.approx([width, height], abs=0.09 if dataset == 'aircraft' else 0.02)


@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason='TIMM_REPO, a checkout of timm, is not set: no train.py')
@pytest.mark.parametrize('name', NAMES)
def test_recipe_arguments(name, monkeypatch):
    """Every key is an argument of timm's train script, and its value passes its parser."""
    spec = spec_from_file_location('timm_train_script', Path(os.environ['TIMM_REPO']) / 'train.py')
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    known = {action.dest: action for action in script.parser._actions}
    recipe = _recipe(name)
    assert set(recipe) <= set(known)
    for key, value in recipe.items():
        of_type = known[key].type
        for item in value if isinstance(value, list) else [value]:
            assert item is None or of_type is None or of_type(item) == item, key
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(RECIPES / f'{name}.yaml'), '--data-dir', 'DATA'])
    args, _ = script._parse_args()
    assert args.device_modules == ['timm_bilinear'] and args.model_kwargs == recipe['model_kwargs']
