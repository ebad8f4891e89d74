"""What a card says is true, and of no use to find one's way on the machine of who wrote it."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from hub_cases import LABELS
from huggingface_hub import ModelCard, constants
from PIL import Image
from small_models import create

from timm_bilinear import push_to_hub
from timm_bilinear.hub.checkpoint import Trained
from timm_bilinear.hub.licenses import LICENSES, check_license
from timm_bilinear.hub.model_card import License, create_card


@pytest.fixture(scope='module')
def net():
    return create(backbone_a='test_resnet', num_classes=3)


@pytest.mark.parametrize(
    'args,said',
    [
        (dict(amp=False, amp_dtype='float16'), 'float32'),  # the train script's defaults
        (dict(amp=True, amp_dtype='float16'), 'autocast to float16'),
        (dict(amp=True, amp_dtype='bfloat16'), 'autocast to bfloat16'),
        (dict(amp=True), 'autocast to float16'),
        (dict(amp=False, amp_dtype='float16', model_dtype='bfloat16'), 'bfloat16'),
        (dict(stages=[dict(lr=1.0)], amp_dtype=None), 'float32'),
        (dict(stages=[dict(lr=1.0)], amp_dtype='float32'), 'float32'),
        (dict(stages=[dict(lr=1.0)], amp_dtype='bfloat16'), 'autocast to bfloat16'),
        (dict(stages=[dict(lr=1.0)], amp_dtype='auto'), None),
        (dict(stages=[dict(lr=1.0)]), None),
        (dict(lr=0.1), None),
        (dict(lr=0.1, amp_dtype='float16'), None),
    ],
)
def test_precision(net, args, said):
    text = create_card(Trained(net, args=args), 'me/m').text
    assert (f'| precision | {said} |' in text) if said else ('| precision |' not in text)
    assert ('float16' in text) == ('float16' in (said or ''))


PATHS = (
    '/home/me/secret/w.pth', 'local-dir:secret', '~/secret', './secret', '../secret/x', 'C:\\secret\\x', 'secret/x',
    'secret.safetensors', 'secret.PTH', 'file:///secret', '\\\\server\\secret', 'local-dir:C:/secret',
)  # fmt: skip


@pytest.mark.parametrize('path', PATHS)
def test_no_path_is_in_the_card(path):
    names = ('data_dir', 'data', 'model', 'weights', 'initial_checkpoint', 'class_map', 'output')
    args = dict.fromkeys(names, path)
    args.update(model_kwargs=dict(a=path), lr=0.1, pretrained=path, aa=path, train_aug=dict(scale=[0.1, 1], x=[path]))
    args.update(stages=[dict(lr=1.0, opt=path)], opt=path, resume=path, experiment=path, versions=dict(torch=path))
    net = timm.create_model('test_resnet', num_classes=3)
    net._model_args = dict(net._model_args, file=path, nested=dict(a=[path], b=2))
    content = create_card(Trained(net, args=args), 'me/m').content
    assert 'secret' not in content and '| lr | 0.1 |' in content
    assert "| train_aug | {'scale': [0.1, 1]} |" in content and "| nested | {'b': 2} |" in content


def test_what_is_no_path_stays(net):
    args = dict(
        aa='rand-m9-mstd0.5-inc1', opt='sgd', scale=(0.3, 1.0), stages=[dict(lr=1.0, opt='sgd')], pretrained=True
    )
    text = create_card(Trained(net, args=args), 'me/m').text
    for said in (
        'rand-m9-mstd0.5-inc1',
        '| opt | sgd |',
        '(0.3, 1.0)',
        "[{'lr': 1.0, 'opt': 'sgd'}]",
        'pretrained | True',
    ):
        assert said in text, said


@pytest.mark.parametrize('dataset', ['/data/birds', '~/birds', './birds', 'C:\\birds', 'a/b/c', 'here/birds'])
def test_dataset_is_no_path(net, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here' / 'birds').mkdir(parents=True)
    with pytest.raises(ValueError, match="'dataset' must be the name of a dataset"):
        push_to_hub(net, 'me/m', dry_run='out', dataset=dataset)
    push_to_hub(net, 'me/m', dry_run='out', dataset='owner/birds')


def test_figures_of_half_precision(net, tmp_path):
    trained = Trained(net, metrics=dict(eval_top1=71.5, test_top1=70.0))
    full, half = (create_card(trained, 'me/m', half=half) for half in (False, True))
    assert {r.metric_name for r in full.data.eval_results} == {'top-1, validation', 'top-1, test'}
    assert all('in float32, before halving' in r.metric_name for r in half.data.eval_results)
    assert 'top-1, test (of the weights in float32, before halving) | 70.00 %' in half.text
    assert 'halving' not in full.content and 'float16' not in full.content
    assert '| stored in | float16 (matrices)' in half.text

    push_to_hub(net, 'me/m', dry_run=tmp_path / 'm', half=True, metrics=dict(test_top1=69.5))
    card = ModelCard.load(tmp_path / 'm' / 'README.md')
    assert 'halving' not in card.content and '| top-1, test | 69.50 % |' in card.text
    for metrics, message in ((dict(top1=1.0), "got 'top1'"), (dict(test_top1=101), 'in percent')):
        with pytest.raises(ValueError, match=message):
            push_to_hub(net, 'me/m', dry_run=tmp_path / 'n', metrics=metrics)


@pytest.mark.parametrize(
    'license,message',
    [
        ('Apache-2.0', "did you mean 'apache-2.0'"),
        ('MIT ', "did you mean 'mit'"),
        ('apache 2.0', "did you mean 'apache-2.0'"),
        ('cc-by-nc', 'did you mean'),
        ('my own terms', "'other' and a name"),
        ('', "got ''"),
        (['mit'], r"got \['mit'\]"),
        ('other', 'name is missing'),
    ],
)
def test_unknown_licences(net, tmp_path, license, message):
    with pytest.raises(ValueError, match=message) as e:
        push_to_hub(net, 'me/m', dry_run=tmp_path / 'm', license=license)
    assert '\n' not in str(e.value) and not (tmp_path / 'm').exists()


def test_licences(net, tmp_path):
    for license in LICENSES - {'other'}:
        check_license(license)
    assert {'mit', 'apache-2.0', 'cc-by-nc-4.0', 'openrail', 'gpl-3.0', 'ofl-1.1'} <= LICENSES
    url = 'https://example.com/terms'
    push_to_hub(net, 'me/m', dry_run=tmp_path / 'm', license='other', license_name='my-terms', license_link=url)
    data = ModelCard.load(tmp_path / 'm' / 'README.md').data
    assert (data.license, data.license_name, data.license_link) == ('other', 'my-terms', url)
    push_to_hub(tmp_path / 'm', 'me/m', dry_run=tmp_path / 'again')
    for options in (dict(license='mit', license_name='x'), dict(license_name='x'), dict(license_link='x')):
        with pytest.raises(ValueError, match='licen'):
            push_to_hub(net, 'me/m', dry_run=tmp_path / 'n', **options)
    with pytest.raises(ValueError, match='URL'):
        create_card_with = dict(license='other', license_name='x', license_link='/home/me/LICENSE')
        push_to_hub(net, 'me/m', dry_run=tmp_path / 'n', **create_card_with)
    assert create_card(Trained(net), 'me/m', license=License('mit')).data.license == 'mit'


def test_a_model_loaded_from_a_folder_keeps_what_is_known(net, tmp_path):
    config = dict(
        input_size=(3, 96, 96), crop_pct=0.7, crop_mode='border', mean=(0.1, 0.2, 0.3), interpolation='bilinear'
    )
    first = push_to_hub(net, 'me/m', dry_run=tmp_path / 'first', label_names=LABELS, data_config=config)
    loaded = timm.create_model(f'local-dir:{first}', pretrained=True)
    second = push_to_hub(loaded, 'me/m', dry_run=tmp_path / 'second')
    for name in ('config.json', 'model.safetensors', 'README.md'):
        assert (tmp_path / 'second' / name).read_bytes() == (tmp_path / 'first' / name).read_bytes(), name
    cfg = timm.create_model(f'local-dir:{second}').pretrained_cfg
    assert list(cfg['label_names']) == LABELS and cfg['crop_mode'] == 'border' and tuple(cfg['mean']) == (0.1, 0.2, 0.3)


def test_sizes_for_tests_are_kept(tmp_path):
    plain = timm.create_model('test_resnet', num_classes=3)
    plain.pretrained_cfg = dict(plain.pretrained_cfg, test_input_size=(3, 192, 192), test_crop_pct=1.0)
    push_to_hub(plain, 'me/m', dry_run=tmp_path / 'm')
    cfg = timm.create_model(f'local-dir:{tmp_path / "m"}').pretrained_cfg
    assert tuple(cfg['test_input_size']) == (3, 192, 192) and cfg['test_crop_pct'] == 1.0
    push_to_hub(plain, 'me/m', dry_run=tmp_path / 'n', data_config=dict(input_size=(3, 96, 96)))
    assert not timm.create_model(f'local-dir:{tmp_path / "n"}').pretrained_cfg.get('test_input_size')


def test_the_snippet_runs_for_a_user(hub, net, tmp_path):
    """In a process of its own, which downloads from the Hub, on a photograph that was taken sideways."""
    push_to_hub(net, 'me/insects', label_names=LABELS, data_config=dict(input_size=(3, 64, 64), crop_pct=1.0))
    card = hub.repos['me/insects'].commits[-1][1]['README.md'].decode()
    code = card.split('```python\n')[1].split('```')[0]
    assert code.index('import timm_bilinear') < code.index('create_model')
    upright = Image.new('RGB', (64, 64))
    upright.paste((250, 200, 20), (0, 0, 64, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / 'image.jpg', exif=exif, quality=100, subsampling=0)
    env = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    env.update(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / 'home'), HF_HUB_DISABLE_XET='1', OMP_NUM_THREADS='1')
    code += "\ntorch.save(image, 'seen.pt')\n"
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert {line.split(':')[0] for line in run.stdout.splitlines()} == set(LABELS)
    config = timm.data.resolve_input_data_config(net, dict(input_size=(3, 64, 64), crop_pct=1.0))
    wanted = timm.data.create_transform(**config)(upright)[None]
    assert (torch.load(tmp_path / 'seen.pt') - wanted).abs().mean() < 0.1
    assert str(tmp_path) not in card and constants.ENDPOINT not in card
