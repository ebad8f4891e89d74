"""Which images a stage sees, and what a run says of it and of its end."""

import pytest
from finetune_cases import SMALL, make_images

from timm_bilinear.tools.finetune import Stage, finetune
from timm_bilinear.tools.frozen import FeatureError, FrozenStage
from timm_bilinear.tools.remedies import stopped

FROZEN = [Stage(1, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data'), (8, 4))


def test_features_that_are_not_finite(data, tmp_path, monkeypatch):
    """The remedy goes by the error, not by the names in it."""

    def fail(*_):
        raise FeatureError("features are not finite in half precision, of 'loss/gloss.png'")

    monkeypatch.setattr(FrozenStage, 'train_epoch', fail)
    with pytest.raises(RuntimeError, match=r"gloss\.png'; --head-cache 0 does without\.$"):
        finetune(data, tmp_path / 'out', **dict(SMALL, stages=FROZEN))


@pytest.mark.parametrize(
    'given, named',
    [
        ({}, None),
        (dict(train_aug=dict(hflip=0.25)), None),
        (dict(train_aug=dict(vflip=0.0, auto_augment=None, hflip=0.0)), None),
        (dict(train_aug=dict(scale=(0.3, 1.0))), 'scale'),
        (dict(train_aug=dict(ratio=(1, 1), color_jitter=0.1, vflip=0.5, auto_augment='rand-m9')), None),
        (dict(train_size=24), 'train_size'),
    ],
)
def test_tells_that_kept_features_are_not_augmented(data, tmp_path, capsys, given, named):
    kwargs = dict(SMALL, stages=FROZEN)
    finetune(data, tmp_path / 'out', **dict(kwargs, **given))
    out = capsys.readouterr().out
    mirrored = 'not mirrored' if given.get('train_aug', {}).get('hflip') == 0 else 'mirrored at random'
    assert f'; images are whole and {mirrored}, features computed once (--head-cache 0 augments)' in out
    aug = given.get('train_aug', {})
    named = 'ratio, color_jitter, vflip, auto_augment' if 'ratio' in aug else named
    told = f'Warning: Stage 1/1 does without {named}, which --head-cache 0 has'
    assert (told in out) if named else ('does without' not in out)
    finetune(data, tmp_path / 'images', **dict(kwargs, **given, head_cache=0))
    out = capsys.readouterr().out
    assert 'whole' not in out and 'does without' not in out


@pytest.mark.parametrize(
    'epochs, has_features, overwrite, told',
    [
        (0, False, False, "before the first epoch was saved in 'a b': the same command starts anew."),
        (0, True, False, 'are kept; go on with the same command, or with DATA and --resume.'),
        (0, True, True, 'are kept; go on with the same command without --overwrite, or with DATA and --resume.'),
        (1, True, True, "1 epoch is kept in 'a b'; go on with `timm-bilinear finetune --output 'a b' --resume`."),
        (2, False, False, "2 epochs are kept in 'a b'; go on with `timm-bilinear finetune --output 'a b' --resume`."),
    ],
)
def test_how_to_go_on(epochs, has_features, overwrite, told):
    assert stopped('a b', epochs, has_features, overwrite).endswith(told)
