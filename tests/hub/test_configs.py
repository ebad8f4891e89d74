"""A config.json that anybody may have written: what is believed of it, and that what push writes is."""

import json
import time

import pytest
import torch
from hub_cases import NAME, assert_same, files_of, pull, push
from small_models import create


def test_configs_of_huge_models_are_not_trusted(hub, model, tmp_path, monkeypatch):
    # Every number is one that a model has, but all together are 33 million entries for a million classes.
    files = files_of(model, tmp_path)
    config = json.loads(files['config.json'])
    config['num_classes'] = config['pretrained_cfg']['num_classes'] = config['model_args']['num_classes'] = 10**6
    config['model_args'].update(backbone_a='vgg16', backbone_b='vgg16', proj_dim=None)
    hub.add_repo(NAME, dict(files, **{'config.json': json.dumps(config).encode()}))
    monkeypatch.setattr(torch.nn.init, 'kaiming_uniform_', lambda x, **_: x if x.is_meta else 1 / 0)
    with pytest.raises(ValueError, match='is not trusted: a model of'):
        pull()


@pytest.mark.parametrize(
    'args',
    [
        dict(backbone_a='test_resnet', backbone_args=dict(layers=[65536] * 4)),
        dict(backbone_a='test_vit', backbone_args=dict(depth=60000)),
        dict(backbone_a='swinv2_tiny_window8_256', img_size=16384, backbone_args=dict(window_size=512, depths=[1] * 4)),
    ],
    ids=lambda args: args['backbone_a'],
)
def test_configs_of_deep_models_end_soon(hub, model, tmp_path, args):
    files = files_of(model, tmp_path)
    config = json.loads(files['config.json'])
    config['model_args'] = args
    hub.add_repo(NAME, dict(files, **{'config.json': json.dumps(config).encode()}))
    start = time.process_time()
    with pytest.raises(ValueError, match='is not trusted: a model of'):
        pull()
    assert time.process_time() - start < 60


def test_pushed_arguments_are_pulled(hub):
    # What says how a model is made, not what it is, is not published; nor would it keep anybody from the model.
    kwargs = dict(all_levels=True, pretrained_streams=False, freeze_backbone=True, cache_dir=None, bn_eps=1e-3)
    model = create(backbone_a='test_resnet', backbone_args={}, proj_dim=8, eps=1e-3, num_classes=3, **kwargs)
    push(model)
    files = hub.repos[NAME].commits[-1][1]
    config = json.loads(files['config.json'])
    assert not {'all_levels', 'pretrained_streams', 'freeze_backbone'} & set(config['model_args'])
    assert_same(pull(), model)
    config['model_args'].update(pretrained_streams=False, all_levels=False, freeze_backbone=True)
    hub.repos[NAME].commit(dict(files, **{'config.json': json.dumps(config).encode()}))
    assert_same(pull(), model)


@pytest.mark.parametrize(
    'change,named',
    [
        (dict(model_args=dict(backbone_a='hf-hub:evil/x')), 'backbone_a'),
        (dict(model_args=dict(backbone_a='local-dir:/etc')), 'backbone_a'),
        (dict(model_args=dict(backbone_b='no/such/x')), 'backbone_b'),
        (dict(model_args=dict(proj_dim=10**9)), 'proj_dim'),
        (dict(model_args=dict(in_chans=10**9)), 'in_chans'),
        (dict(model_args=dict(img_size=[10**9, 3])), 'img_size'),
        (dict(model_args=dict(pretrained_streams=True)), 'pretrained_streams'),
        (dict(model_args=dict(all_levels=True)), 'all_levels'),
        (dict(num_classes=10**9), 'num_classes'),
        (dict(model_args=dict(num_classes=10**10)), 'num_classes'),
        (dict(model_args=dict(num_classes=-1)), 'num_classes'),
        (dict(model_args=dict(num_classes='3')), 'num_classes'),
        (dict(model_args=dict(num_classes=True)), 'num_classes'),
        (dict(pretrained_cfg=dict(num_classes=10**10)), 'num_classes'),
        (dict(pretrained_cfg=dict(input_size=[3, 10**10, 10**10])), 'input_size'),
        (dict(pretrained_cfg=dict(std=[float('nan'), 1, 1])), 'std'),
        (dict(pretrained_cfg=dict(std=[0, 1, 1])), 'std'),
        (dict(pretrained_cfg=dict(mean='x')), 'mean'),
        (dict(pretrained_cfg=dict(input_size=[3, 10**8, 10**8])), 'input_size'),
        (dict(pretrained_cfg=dict(input_size=[3, -1, -1])), 'input_size'),
        (dict(pretrained_cfg=dict(input_size='abc')), 'input_size'),
        (dict(pretrained_cfg=dict(crop_pct=-5)), 'crop_pct'),
        (dict(pretrained_cfg=dict(label_offset=10**9)), 'label_offset'),
        (dict(pretrained_cfg=dict(classifier=5)), 'classifier'),
        (dict(pretrained_cfg=dict(first_conv=[5])), 'first_conv'),
        (dict(pretrained_cfg=dict(state_dict={'a': 1})), 'state_dict'),
        (dict(model_args=dict(num_classes=10**400)), 'num_classes'),
        (dict(foo=10**400), 'foo'),
        (dict(model_args=dict(bn_eps=0)), 'bn_eps'),
        (dict(num_features=10**12), 'num_features'),
        (dict(model_args=dict(eps=0)), 'eps'),
        (dict(model_args=dict(eps=float('inf'))), 'eps'),
        (dict(model_args=dict(eps=[1e-3])), 'eps'),
        (dict(model_args=dict(out_index_a=10**6)), 'out_index_a'),
        (dict(model_args=dict(img_size=[96])), 'img_size'),
        (dict(model_args=dict(backbone_args=dict(layers=[10**9]))), 'backbone_args'),
        (dict(model_args=dict(pool_type='evil')), 'pool_type'),
        (dict(model_args=dict(global_pool='evil')), 'global_pool'),
        (dict(model_args=dict(proj_dim=None, backbone_args={}, iterations=3)), 'iterations'),
        (dict(model_args=dict(device='cuda')), 'device'),
        (dict(pretrained_cfg=dict(url='https://example.invalid/x')), 'url'),
        (dict(pretrained_cfg=dict(custom_load=True)), 'custom_load'),
    ],
    ids=str,
)
def test_configs_are_not_trusted(hub, model, tmp_path, change, named):
    files = files_of(model, tmp_path)
    config = json.loads(files['config.json'])
    for key, value in change.items():
        config[key] = dict(config[key], **value) if isinstance(value, dict) else value
    hub.add_repo(NAME, dict(files, **{'config.json': json.dumps(config).encode()}))
    with pytest.raises(ValueError, match=f"'{NAME}' is not trusted: {named}="):
        pull()
    assert hub.count('GET /large/') == 0
