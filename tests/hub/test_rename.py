"""A folder with a card that is pushed under another name does not keep the old one."""

import pytest
from huggingface_hub import ModelCard
from small_models import create

from timm_bilinear import push_to_hub
from timm_bilinear.hub.checkpoint import Trained
from timm_bilinear.hub.model_card import create_card
from timm_bilinear.hub.rename import rename_card


def card(repo_id, metrics=(('eval_top1', 50.0),), **kwargs):
    net = create(backbone_a='test_resnet', num_classes=3)
    return str(create_card(Trained(net, metrics=dict(metrics)), repo_id, **kwargs))


@pytest.mark.parametrize('new', ['me/moths', 'you/insects', 'you/moths', 'me/insects-2', 'me/123', 'me/on', 'me/1e5'])
def test_generated_cards(new):
    # as if it had been generated for the new name
    for options in (dict(dataset='insects'), dict(metrics=())):
        assert rename_card(card('me/insects', **options), new) == card(new, **options)


def test_what_is_written_by_hand_stays():
    text = card('me/insects') + '\nSee me/insects-2, hf-hub:me/insects-2 and https://huggingface.co/me/insects.\r\n'
    renamed = rename_card(text, 'you/moths')
    assert 'See me/insects-2, hf-hub:me/insects-2 and https://huggingface.co/you/moths.\r\n' in renamed
    assert ModelCard(renamed).data.eval_results and renamed.count("'hf-hub:you/moths'") == 1
    for text in ('my card', '', '# insects\n', card('you/moths') + '\nMade from hf-hub:me/insects.\n'):
        assert rename_card(text, 'you/moths') == text


def test_several_models():
    text = card('me/insects') + '\n`hf-hub:them/other` is larger.\n'
    renamed = rename_card(text, 'you/moths')
    assert 'me/insects' not in renamed and 'hf-hub:them/other' in renamed and '# moths\n' in renamed
    with pytest.raises(ValueError, match=r"loads 'a/b', 'c/d', none of which is 'you/moths'") as e:
        rename_card('# mine\n hf-hub:a/b hf-hub:c/d', 'you/moths')
    assert '\n' not in str(e.value)


def test_push(tmp_path):
    net = create(backbone_a='test_resnet', num_classes=3)
    push_to_hub(net, 'me/insects', dry_run=tmp_path / 'old', label_names=['x', 'y', 'z'], license='mit')
    (tmp_path / 'old' / 'args.yaml').write_text('data_dir: /home/me/secret\n')
    push_to_hub(tmp_path / 'old', 'you/moths', dry_run=tmp_path / 'new')
    for path in (tmp_path / 'new').iterdir():
        assert b'insects' not in path.read_bytes() and b'/home/' not in path.read_bytes(), path
    assert "'hf-hub:you/moths'" in (tmp_path / 'new' / 'README.md').read_text()
    assert "'hf-hub:me/insects'" in (tmp_path / 'old' / 'README.md').read_text()  # which is left as it is
    assert not (tmp_path / 'new' / 'args.yaml').exists()


@pytest.mark.parametrize(
    'line,message',
    [
        ('license: my-own', "got 'my-own'"),
        ('license: [mit, mine]', "got 'mine'"),
        ('license: other', 'name is missing'),
        ('license: [a', 'card'),
    ],
)
def test_cards_with_another_licence(tmp_path, line, message):
    push_to_hub(create(backbone_a='test_resnet', num_classes=3), 'me/insects', dry_run=tmp_path / 'old', license='mit')
    path = tmp_path / 'old' / 'README.md'
    path.write_text(path.read_text().replace('license: mit', line))
    with pytest.raises(ValueError, match=message) as e:
        push_to_hub(tmp_path / 'old', 'me/insects', dry_run=tmp_path / 'new')
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path / 'new').exists()
