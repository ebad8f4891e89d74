"""Cards say what the model is, and their code runs as it stands."""

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from small_models import create

import timm_bilinear
from timm_bilinear.hub import push_to_hub
from timm_bilinear.hub.checkpoint import Trained
from timm_bilinear.hub.model_card import create_card

LABELS = ['ant', 'bee', 'cat']
BILINEAR = ('A bilinear CNN', '1504.07889', 'bilinear-cnn', 'lin2015bilinear', 'descriptor')


def card_of(model, tmp_path, **kwargs):
    folder = push_to_hub(model, 'me/insects', dry_run=tmp_path / 'repo', **kwargs)
    return ModelCard.load(f'{folder}/README.md')


def run_usage(card, tmp_path, monkeypatch):
    """Run the card's code on a colour image with a transparent part, in a namespace of its own."""
    code = card.text.split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(tmp_path)
    Image.new('RGBA', (80, 70), (200, 100, 0, 128)).convert('RGB').save('image.jpg')
    names = {}
    exec(code.replace('hf-hub:me/insects', f'local-dir:{tmp_path / "repo"}'), names)
    return names


@pytest.mark.parametrize('in_chans', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('plain', [False, True])
def test_classifiers(tmp_path, monkeypatch, capsys, in_chans, plain):
    kwargs = dict(num_classes=3, in_chans=in_chans)
    model = timm.create_model('test_resnet', **kwargs) if plain else create(backbone_a='test_resnet', **kwargs)
    card = card_of(model, tmp_path, label_names=LABELS)
    names = run_usage(card, tmp_path, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert {line.split(':')[0] for line in printed} == set(LABELS)
    assert names['image'].shape[1] == in_chans
    assert card.data.pipeline_tag == 'image-classification' and '| classes | 3 |' in card.text
    assert card.text.index('import timm_bilinear') < card.text.index('create_model')
    for said in BILINEAR:
        assert (said in card.content) != plain, said
    if plain:
        assert 'The timm model `test_resnet`' in card.text and 'unit length' not in card.text
    else:
        assert 'entries of unit length' in card.text
        torch.testing.assert_close(names['descriptors'].norm(dim=1), torch.ones(1))


def test_classifiers_of_whole_images(tmp_path, monkeypatch, capsys):
    """The code prepares an image as `predict` does: timm's transform alone shows one view of a screenshot."""
    model = create(backbone_a='test_resnet', num_classes=3, pretrained_cfg_overlay=dict(crop_mode='border'))
    names = run_usage(card_of(model, tmp_path, label_names=LABELS), tmp_path, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    (want,) = timm_bilinear.predict(names['model'], 'image.jpg')
    assert printed == [f'{p["name"]}: {100 * p["probability"]:.1f} %' for p in want['predictions']]
    assert {line.split(':')[0] for line in printed} == set(LABELS)


@pytest.mark.parametrize('kind', ['bilinear', 'unpooled', 'unpooled classifier', 'plain', 'plain unpooled'])
def test_feature_extractors(tmp_path, monkeypatch, capsys, kind):
    if kind.startswith('plain'):
        pool = {'global_pool': ''} if kind == 'plain unpooled' else {}
        model = timm.create_model('test_resnet', num_classes=0, **pool)
    else:
        classes = 3 if kind == 'unpooled classifier' else 0
        model = create(backbone_a='test_resnet', num_classes=classes, pool_type='avg' if kind == 'bilinear' else '')
    card = card_of(model, tmp_path)
    names = run_usage(card, tmp_path, monkeypatch)
    assert capsys.readouterr().out == ''
    assert card.data.pipeline_tag == 'image-feature-extraction' and 'image-classification' not in card.content
    assert 'softmax' not in card.text and 'label_names' not in card.text and '| classes |' not in card.text
    if kind == 'bilinear':
        assert names['descriptors'].shape == (1, model.head_hidden_size) and 'unit length' in card.text
    else:
        assert 'descriptors' not in card.text and 'unit length' not in card.text
        assert names['features'].ndim == (2 if kind == 'plain' else 4)
    if kind.startswith('unpooled'):
        assert f'map of {names["features"].shape[1]} channels' in card.text
    assert 'import timm_bilinear' in card.text
    for said in ('of a bilinear CNN' if kind.startswith('un') else 'A bilinear CNN', 'lin2015bilinear'):
        assert (said in card.content) != kind.startswith('plain'), said


@pytest.mark.parametrize(
    'args,origin', [({}, 'published with'), (dict(opt='sgd'), 'train script'), (dict(stages=[]), 'fine-tuned with')]
)
def test_origin(args, origin):
    text = create_card(Trained(timm.create_model('test_resnet'), args=args), 'me/insects').text
    assert f'{origin} timm_bilinear' in text if 'with' in origin else f"trained with timm's {origin}" in text
