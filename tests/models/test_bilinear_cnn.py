"""The module itself: freezing, empty batches, images that are not finite, and how two streams reach the head."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import GRIDS, ONE, TWO, create, images, randomise_norms
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures('clean_up')

MODELS = {'one': ONE, 'two': dict(TWO, proj_dim=16), 'grids': dict(GRIDS, proj_dim=16)}
VIT = dict(backbone_a='test_vit', num_classes=5)


# --- freezing


def flags(model):
    return {name: param.requires_grad for name, param in model.named_parameters()}


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def part_frozen():
    """A model in which a user has frozen some weights and batch norms by hand."""
    model = timm.create_model('bcnn', **MODELS['two']).train()
    model.stream_a.conv1.requires_grad_(False)
    model.stream_a.bn1.eval()
    model.stream_b.stem_0.bias.requires_grad_(False)
    model.head.proj_a.requires_grad_(False)
    model.head.drop.eval()
    return model


def unchanged(model):
    return model


@pytest.mark.parametrize('twin', [unchanged, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize('times', [1, 2])
def test_unfreezing_restores_what_was_trainable(twin, times):
    model = part_frozen()
    before = flags(model), modes(model)
    assert not all(before[0].values()) and not all(before[1].values())
    for _ in range(times):
        model.set_freeze_backbone()
    model = twin(model)
    frozen = flags(model)
    assert not any(value for name, value in frozen.items() if name.startswith('stream_'))
    assert not any(value for name, value in modes(model).items() if name.startswith('stream_'))
    assert all(frozen[name] == value for name, value in before[0].items() if name.startswith('head.'))
    for _ in range(times):
        model.set_freeze_backbone(False)
    assert (flags(model), modes(model)) == before
    model.set_freeze_backbone()  # and all over again
    model.set_freeze_backbone(False)
    assert (flags(model), modes(model)) == before


def test_unfreezing_what_was_never_frozen_changes_nothing():
    model = part_frozen()
    before = flags(model), modes(model)
    model.set_freeze_backbone(False)
    assert (flags(model), modes(model)) == before and model.freeze_backbone is False


def test_unfreezing_after_the_constructor_froze():
    model = timm.create_model('bcnn', freeze_backbone=True, **MODELS['two'])
    model.set_freeze_backbone(False)
    assert all(flags(model).values()) and all(modes(model).values())


@pytest.mark.parametrize('frozen_in,unfrozen_in', [(True, True), (True, False), (False, True), (False, False)])
def test_modes_follow_the_model(frozen_in, unfrozen_in):
    model = timm.create_model('bcnn', **ONE).train(frozen_in)
    model.set_freeze_backbone()
    for mode in (not frozen_in, unfrozen_in):
        model.train(mode)
        assert not any(m.training for m in model.stream_a.modules()) and model.head.training == mode
    model.set_freeze_backbone(False)
    assert set(modes(model).values()) == {unfrozen_in}


def test_parameters_added_while_frozen_keep_their_flag():
    model = timm.create_model('bcnn', freeze_backbone=True, **ONE)
    model.stream_a.conv1.register_parameter('scale', nn.Parameter(torch.ones(1)))
    model.stream_a.bn1.register_parameter('shift', nn.Parameter(torch.ones(1), requires_grad=False))
    model.set_freeze_backbone(False)
    assert flags(model)['stream_a.conv1.scale'] and not flags(model)['stream_a.bn1.shift']


# --- empty batches


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
@pytest.mark.parametrize('kwargs', [*MODELS.values(), VIT, dict(VIT, backbone_a='test_mambaout')], ids=str)
def test_empty_batch(kwargs, pool_type, training):
    model = create(pool_type=pool_type, **kwargs).train(training)
    before = copy.deepcopy(model.state_dict()), modes(model)
    x = torch.randn(0, 3, 160, 160, requires_grad=True)
    features = model.forward_features(x)
    assert features.shape == (0, *model.forward_features(images(size=160))[0].shape)
    assert model.forward_head(features).shape == (0, 5)
    assert model.forward_head(features, pre_logits=True).shape == (0, model.head_hidden_size)
    last, maps = model.forward_intermediates(x)
    assert last.shape == features.shape
    assert [m.shape[1:] for m in maps] == [m.shape[1:] for m in model.forward_intermediates(images(size=160))[1]]
    assert {len(m) for m in maps} == {0}
    model.load_state_dict(before[0])
    logits = model(x)
    assert logits.shape == (0, 5) and logits.dtype == torch.float32
    logits.sum().backward()
    assert x.grad.shape == x.shape
    # Distributed training waits for a gradient of every parameter that the other ranks have one of.
    model(images(size=160)[:1].repeat(2, 1, 1, 1)).sum().backward(inputs=list(model.head.fc.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.stream_a.parameters() if p.requires_grad)
    assert modes(model) == before[1]


def test_empty_batch_leaves_no_trace():
    model = randomise_norms(create(**MODELS['two'])).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(0, 3, 64, 64))
    model.forward_intermediates(torch.randn(0, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_empty_batch_without_pooling_or_classifier():
    x = torch.randn(0, 3, 64, 64)
    assert create(**dict(TWO, num_classes=0))(x).shape == (0, 96 * 64)
    assert create(global_pool='', **dict(TWO, num_classes=0))(x).shape == (0, 160, 2, 2)


def test_empty_batch_under_autocast():
    with torch.autocast('cpu', torch.bfloat16):
        assert create(**TWO)(torch.randn(0, 3, 64, 64)).shape == (0, 5)


# --- images that are not finite


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('pool_type', ['avg', 'sum', 'max'])
@pytest.mark.parametrize('kwargs', [*MODELS.values(), VIT], ids=[*MODELS, 'vit'])
def test_a_nan_image_spoils_its_own_row_alone(kwargs, pool_type, value):
    model = create(pool_type=pool_type, **kwargs)
    x = images(batch=3, size=160)
    with torch.inference_mode():
        expected = model(x)
        x[1, 0, 5, 5] = value
        logits = model(x)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]])
    assert logits[1].isnan().all()


# --- two streams and the head


class Calls(TorchDispatchMode):
    """Operators called, by name, with the sizes of what they gave."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.sizes.append((func.overloadpacket.__name__, tuple(out.shape)))
        return out


@pytest.mark.parametrize('kwargs', [TWO, MODELS['two'], MODELS['grids']], ids=['two', 'projected', 'grids'])
def test_two_streams_are_not_concatenated(kwargs):
    model = create(**kwargs)
    x = images()
    given = []
    hook = model.head.register_forward_pre_hook(lambda _, x, kw: given.append((*x, kw['x_b'])), with_kwargs=True)
    outputs = {}
    for name in ('stream_a', 'stream_b'):
        getattr(model, name).register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out[-1]}))
    with torch.no_grad(), Calls() as calls:
        logits = model(x)
    hook.remove()
    ((a, b),) = given
    assert b is outputs['stream_b'] and (a is outputs['stream_a'] or kwargs['out_index_a'] == 3)
    assert not [size for name, size in calls.sizes if name == 'cat']
    with torch.no_grad():
        torch.testing.assert_close(logits, model.forward_head(model.forward_features(x)))


def test_two_streams_without_pooling():
    model = create(global_pool='', **dict(TWO, num_classes=0))
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize('kwargs', MODELS.values(), ids=MODELS)
def test_hooks_of_the_head_are_called(kwargs):
    model = create(**kwargs)
    called = []
    model.head.register_forward_hook(lambda module, args, out: called.append(tuple(out.shape)))
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    assert called == [(2, 5)]
