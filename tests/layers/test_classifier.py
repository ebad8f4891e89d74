"""The classifier is a module like any other: one list of what is done to classifiers, on timm's model and on ours."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor as timm_create_feature_extractor
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.models.feature_extraction import create_feature_extractor

from timm_bilinear.layers.pooling import AvgPooling

pytestmark = [
    pytest.mark.usefixtures('clean_up'),
    pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning'),
]

MODELS = {
    'timm': ('test_resnet', {}),
    'one': ('bcnn', dict(backbone_a='test_resnet', proj_dim=8)),
    'two': ('bcnn', dict(backbone_a='test_resnet', backbone_b='test_convnext', proj_dim=8)),
    'max': ('bcnn', dict(backbone_a='test_resnet', proj_dim=8, pool_type='max')),
}


@pytest.fixture(params=MODELS)
def model(request):
    name, kwargs = MODELS[request.param]
    return timm.create_model(name, num_classes=5, **kwargs).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


class LoRALinear(nn.Linear):
    """A classifier of a subclass, as LoRA or a cosine classifier is."""

    def __init__(self, fc: nn.Linear):
        super().__init__(fc.in_features, fc.out_features)
        self.load_state_dict(fc.state_dict())
        self.down, self.up = nn.Linear(fc.in_features, 2, bias=False), nn.Linear(2, fc.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class CosineLinear(nn.Linear):
    def forward(self, x):
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


def replace(model, fc):
    name = model.pretrained_cfg['classifier']
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, fc)
    return fc


def descriptors(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def step(model, x):
    """One step of training, without batch statistics."""
    logits = model(x)
    F.cross_entropy(logits, torch.arange(3)).backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param.sub_(0.1 * param.grad)
                param.grad = None
    return logits.detach()


def same(logits, model, x):
    torch.testing.assert_close(logits, model.get_classifier()(descriptors(model, x)), atol=1e-5, rtol=1e-4)


HOOKS = {
    'forward': lambda fc, seen: fc.register_forward_hook(lambda m, x, y: seen.append(y)),
    'forward with kwargs': lambda fc, seen: fc.register_forward_hook(
        lambda m, x, k, y: seen.append(y), with_kwargs=True
    ),
    'forward always': lambda fc, seen: fc.register_forward_hook(lambda m, x, y: seen.append(y), always_call=True),
    'pre': lambda fc, seen: fc.register_forward_pre_hook(lambda m, x: seen.append(x)),
    'backward': lambda fc, seen: fc.register_full_backward_hook(lambda m, x, y: seen.append(x)),
    'backward pre': lambda fc, seen: fc.register_full_backward_pre_hook(lambda m, y: seen.append(y)),
    'global': lambda fc, seen: torch.nn.modules.module.register_module_forward_hook(
        lambda m, x, y: seen.append(y) if m is fc else None
    ),
}


@pytest.mark.parametrize('hook', HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize('training', [False, True])
def test_hooks_are_called(model, images, hook, training):
    seen = []
    handle = hook(model.get_classifier(), seen)
    try:
        model.train(training)(images).sum().backward()
        assert len(seen) == 1
    finally:
        handle.remove()
    model(images).sum().backward()
    assert len(seen) == 1


def test_hooks_change_the_result(model, images):
    want = model(images)
    model.get_classifier().register_forward_hook(lambda m, x, y: 2 * y)
    torch.testing.assert_close(model(images), 2 * want, atol=1e-5, rtol=1e-4)


def test_replaced_forward(model, images):
    # As accelerate's offloading does it.
    fc = model.get_classifier()
    want, forward = model(images), fc.forward
    fc.forward = lambda x: forward(x) + 1
    torch.testing.assert_close(model(images), want + 1, atol=1e-5, rtol=1e-4)


def test_offloading(model, images):
    fc = model.get_classifier()
    want, weights = model(images), {k: v.detach().clone() for k, v in fc.named_parameters()}
    fc.to('meta')

    def load(module, args):
        for key, value in weights.items():
            setattr(module, key, nn.Parameter(value))

    fc.register_forward_pre_hook(load)
    fc.register_forward_hook(lambda module, args, out: module.to('meta') and None)
    for _ in range(2):
        torch.testing.assert_close(model(images), want, atol=1e-5, rtol=1e-4)
        assert fc.weight.is_meta


@pytest.mark.parametrize('cls', [LoRALinear, CosineLinear])
def test_subclass(model, images, cls):
    fc = model.get_classifier()
    if cls is LoRALinear:
        replace(model, LoRALinear(fc))
    else:
        cosine = CosineLinear(fc.in_features, fc.out_features)
        replace(model, cosine)
    with torch.no_grad():
        logits = model(images)
        same(logits, model, images)
        assert (logits - F.linear(descriptors(model, images), model.get_classifier().weight)).abs().max() > 1e-3
    before = model.get_classifier().weight.detach().clone()
    for _ in range(2):
        step(model, images)
    assert not torch.equal(model.get_classifier().weight, before)
    same(model(images), model, images)


WEIGHTS = {
    'pruned': lambda fc: prune.l1_unstructured(fc, 'weight', 0.5),
    'weight_norm': lambda fc: weight_norm(fc),
    'spectral_norm': lambda fc: spectral_norm(fc),
    'parametrized weight_norm': parametrizations.weight_norm,
    'orthogonal': parametrizations.orthogonal,
    'parametrized': lambda fc: parametrize.register_parametrization(fc, 'weight', nn.Softplus()),
}


@pytest.mark.parametrize('change', WEIGHTS.values(), ids=[k.replace(' ', '_') for k in WEIGHTS])
def test_reparametrized_weights(model, images, change):
    fc = model.get_classifier()
    change(fc)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    fc.eval()  # spectral norm's iteration
    before = fc.weight.detach().clone()
    logits = [step(model, images) for _ in range(3)]  # old weight_norm failed in the second backward
    assert not torch.equal(logits[0], logits[2])
    model.eval()
    same(model(images), model, images)
    assert not torch.equal(fc.weight.detach(), before)


def test_quantisation_observers(model, images):
    fc = model.get_classifier()
    fc.qconfig = torch.ao.quantization.get_default_qconfig('x86')
    prepared = torch.ao.quantization.prepare(model)
    prepared(images)
    observer = prepared.get_classifier().activation_post_process
    assert observer.max_val > observer.min_val
    fc = model.train().get_classifier()
    fc.qconfig = torch.ao.quantization.get_default_qat_qconfig('x86')
    prepared = torch.ao.quantization.prepare_qat(model)
    for _ in range(2):
        step(prepared, images)
    assert prepared.get_classifier().weight_fake_quant.activation_post_process.max_val.isfinite().all()
    assert prepared.get_classifier().activation_post_process.activation_post_process.max_val.isfinite().all()


def test_dynamic_quantisation(model, images):
    want = model(images)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    logits = quantised(images)
    assert not torch.equal(logits, want)
    torch.testing.assert_close(logits, want, atol=0.1, rtol=0.1)


def test_functional_call(model, images):
    name = model.pretrained_cfg['classifier']
    params = {f'{name}.weight': torch.zeros_like(model.get_classifier().weight)}
    logits = torch.func.functional_call(model, params, (images,))
    torch.testing.assert_close(logits, model.get_classifier().bias.expand(3, 5))


def test_frozen_and_unfrozen(model, images):
    fc = model.get_classifier()
    fc.weight.requires_grad_(False)
    model(images).sum().backward()
    assert fc.weight.grad is None and fc.bias.grad is not None
    fc.weight.requires_grad_(True)
    model(images).sum().backward()
    assert fc.weight.grad is not None


def test_fx(model, images):
    name, want = model.pretrained_cfg['classifier'], model(images)
    traced = torch.fx.symbolic_trace(model)
    for graph in (traced, torch.jit.script(traced)):
        torch.testing.assert_close(graph(images), want, atol=1e-5, rtol=1e-4)
    for create in (create_feature_extractor, timm_create_feature_extractor):
        out = create(model, {name: 'logits'})(images)['logits']
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    prepared = quantize_fx.prepare_fx(model, torch.ao.quantization.get_default_qconfig_mapping('x86'), (images,))
    torch.testing.assert_close(prepared(images), want, atol=1e-5, rtol=1e-4)
    quantised = quantize_fx.convert_fx(prepared)
    assert type(quantised.get_submodule(name)) is not nn.Linear
    assert 0 < (quantised(images) - want).abs().max() < 0.2 * want.abs().max()


def test_sparse_weight(model, images):
    fc, want = model.get_classifier(), model(images)
    fc.weight = nn.Parameter(fc.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(images), want, atol=1e-5, rtol=1e-4)


class DoublingWeight(torch.Tensor):
    """A weight that takes part in the product by a function of its own, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), args[2])
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weight_of_a_subclass(model, images):
    fc = model.get_classifier()
    want = 2 * model(images) - fc.bias
    fc.weight = nn.Parameter(fc.weight.detach().as_subclass(DoublingWeight), requires_grad=False)
    torch.testing.assert_close(model(images).as_subclass(torch.Tensor), want, atol=1e-5, rtol=1e-4)


# --- of ours alone: what sits before the classifier


def test_dropout_of_its_own_mode(images):
    # Monte Carlo dropout: the model in eval mode, its dropout in training mode; and the other way round.
    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5, drop_rate=0.5).eval()
    want = model(images)
    model.head.drop.train()
    assert not torch.equal(model(images), model(images))
    model.head.train()
    model.head.drop.eval()
    torch.testing.assert_close(model(images), want)


@pytest.mark.parametrize(
    'drop', [nn.Sequential(nn.LayerNorm(36), nn.Dropout(0.1)), nn.Identity(), nn.AlphaDropout(0.1)]
)
def test_replaced_dropout(images, drop):
    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5).eval()
    model.head.drop = drop.eval()
    same(model(images), model, images)
    assert model.train()(images).shape == (3, 5)


def test_replaced_pooling(images):
    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5).eval()
    model.head.pool = nn.Sequential(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(48, 36))
    same(model(images), model, images)


def test_pooling_of_a_subclass(images):
    # It has inherited a fused path that knows nothing of its forward.
    class Centred(AvgPooling):
        def forward(self, a, b=None):
            return super().forward(a - a.mean((2, 3), keepdim=True), b)

    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5).eval()
    plain = model(images)
    model.head.pool = Centred((8,))
    same(model(images), model, images)
    assert not torch.allclose(model(images), plain)


@pytest.mark.parametrize('name', ['pool', 'drop', 'proj_a'])
def test_hooks_before_the_classifier(name, images):
    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5).eval()
    want, seen = model(images), []
    handle = model.head.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append(y))
    torch.testing.assert_close(model(images), want, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1 and seen[0].shape[:2] == (3, 8 if name == 'proj_a' else 36)
    handle.remove()
    assert torch.equal(model(images), want) and len(seen) == 1


def test_plain_classifier_is_fused(images, monkeypatch):
    model = timm.create_model('bcnn', backbone_a='test_resnet', proj_dim=8, num_classes=5).eval()
    want = model(images)
    monkeypatch.setattr(model.head.pool, '_call_impl', None)  # what calling the module would need
    assert torch.equal(model(images), want)
