import json
import os
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_bilinear.hub import save_model
from timm_bilinear.tools import export as module
from timm_bilinear.tools.export import export_onnx, run_export
from timm_bilinear.tools.predict import predict

pytestmark = pytest.mark.usefixtures('clean_up')

NAMES = ['a, "b"', 'é', '日本']


def create(name='bcnn', num_classes=3, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dict(backbone_a='test_resnet') if name == 'bcnn' else {}, **kwargs)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    nn.init.normal_(model.get_classifier().weight, std=2.0)
    return model


def metadata(path):
    return {prop.key: prop.value for prop in onnx.load(path).metadata_props}


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {'image': images})[0]


@pytest.fixture
def image(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((120, 90)).save(tmp_path / 'image.png')
    return tmp_path / 'image.png'


def by_metadata(path, image):
    """Probabilities from what the file says alone, with Pillow and numpy."""
    told = metadata(path)
    _, height, width = json.loads(told['input_size'])
    assert told['crop_mode'] == 'squash' and told['interpolation'] == 'bilinear' and told['color_mode'] == 'RGB'
    scale = float(told['crop_pct'])
    size = (int(width / scale), int(height / scale))
    resized = Image.open(image).convert('RGB').resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = (pixels - np.float32(json.loads(told['mean']))) / np.float32(json.loads(told['std']))
    logits = run(path, pixels.transpose(2, 0, 1)[None])[0].astype(np.float64)
    exponentials = np.exp(logits - logits.max())
    return dict(zip(json.loads(told['names']), exponentials / exponentials.sum()))


@pytest.mark.parametrize('opset, exporter', [(None, 'torch.export'), (17, 'TorchScript'), (18, 'torch.export')])
def test_the_file_alone_predicts_as_predict_does(tmp_path, image, opset, exporter):
    config = dict(input_size=(3, 48, 80), crop_pct=0.8, crop_mode='squash', interpolation='bilinear')
    folder = save_model(create(), tmp_path / 'model', NAMES, config)
    path = tmp_path / 'a file.onnx'
    result = export_onnx(folder, path, opset=opset, image=image, repeats=1)
    onnx.checker.check_model(str(path), full_check=True)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['a file.onnx', 'image.png', 'model']  # and no .data
    assert result['exporter'] == exporter and result['opset'] == (opset or result['opset'])
    assert result['bytes'] == path.stat().st_size and result['input_size'] == (3, 48, 80)
    assert 0 <= result['difference'] < 1e-4 and result['eager'] > 0 and result['onnxruntime'] > 0
    told = metadata(path)
    assert told['timm_bilinear_version'] == version('timm_bilinear') and told['timm_version'] == timm.__version__
    assert told['model'] == 'bcnn' and '60 x 100' in told['preprocessing'] and 'descriptions' not in told
    (expected,) = predict(folder, image, amp='float32')
    assert list(by_metadata(path, image)) == NAMES
    found = by_metadata(path, image)
    for p in expected['predictions']:
        assert found[p['name']] == pytest.approx(p['probability'], abs=1e-4)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(backbone_b='test_convnext', out_index_a=3, proj_dim=16),
        dict(pool_type='max', in_chans=1),
        dict(in_chans=4),
        dict(name='test_vit'),
        dict(name='test_efficientnet', in_chans=5),
    ],
    ids=str,
)
def test_models(tmp_path, kwargs):
    model = create(**kwargs)
    size = 160 if kwargs.get('name') == 'test_vit' else 96
    export_onnx(model, tmp_path / 'model.onnx', size=size, repeats=0)
    for batch in (1, 2, 5):
        images = torch.randn(batch, kwargs.get('in_chans', 3), size, size)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(run(tmp_path / 'model.onnx', images.numpy()))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert json.loads(metadata(tmp_path / 'model.onnx')['names']) == ['0', '1', '2']


def test_size_and_names(tmp_path):
    result = export_onnx(create(), tmp_path / 'm.onnx', opset=17, size=(64, 96), label_names=NAMES, repeats=0)
    assert result['input_size'] == (3, 64, 96) and 'eager' not in result
    told = metadata(tmp_path / 'm.onnx')
    assert json.loads(told['input_size']) == [3, 64, 96] and json.loads(told['names']) == NAMES
    with pytest.raises(ValueError, match=r"'test_vit.*does not take images of \(3, 31, 33\)"):
        export_onnx(create('test_vit'), tmp_path / 'm.onnx', size=(31, 33))
    assert metadata(tmp_path / 'm.onnx') == told


def test_descriptions(tmp_path):
    model = create()
    config = dict(model.pretrained_cfg, label_names=['n1', 'n2', 'n3'], label_descriptions={'n1': 'ant', 'n3': 'bee'})
    model.pretrained_cfg = config
    export_onnx(model, tmp_path / 'm.onnx', opset=17, size=64, repeats=0)
    told = metadata(tmp_path / 'm.onnx')
    assert json.loads(told['names']) == ['n1', 'n2', 'n3']
    assert json.loads(told['descriptions']) == ['ant', 'n2', 'bee']


def test_a_users_module_is_left_as_it_was(tmp_path):
    model = create().bfloat16().train()
    model.stream_a.eval()
    modes = [m.training for m in model.modules()]
    config = dict(model.pretrained_cfg)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, tmp_path / 'm.onnx', opset=17, size=64, label_names=NAMES, repeats=0)
    assert [m.training for m in model.modules()] == modes and model.pretrained_cfg == config
    assert all(
        value.dtype == state[k].dtype and torch.equal(value, state[k]) for k, value in model.state_dict().items()
    )


def wrong_metadata(path, *args):
    raise onnx.checker.ValidationError('bad\nnode')


def wrong_export(model, example, path, opset):
    """Of a model that is another one in its third digit."""
    with torch.no_grad():
        model.get_classifier().weight.mul_(1.01)
        try:
            return EXPORT(model, example, path, opset)
        finally:
            model.get_classifier().weight.div_(1.01)


def fixed_batch(model, example, path, opset):
    torch.onnx.export(
        model, (example,), str(path), input_names=['image'], output_names=['logits'], dynamo=False, opset_version=opset
    )
    return 'fixed'


def full_disk(model, example, path, opset):
    path.write_bytes(b'half')
    raise OSError(28, 'No space left on device', str(path))


EXPORT = module._export


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    'name, fault, message',
    [
        ('_write_metadata', wrong_metadata, r"The exported 'bcnn' is not usable \(bad\)\. Nothing was written"),
        ('_export', wrong_export, r'differs from the model at batch size 1'),
        ('_export', fixed_batch, r'batch size 1'),
        ('_export', full_disk, r'No space left'),
    ],
)
def test_after_a_failure_the_old_file_is_there(tmp_path, monkeypatch, name, fault, message):
    (tmp_path / 'm.onnx').write_text('old')
    monkeypatch.setattr(module, name, fault)
    with pytest.raises((RuntimeError, OSError), match=message) as e:
        export_onnx(create(), tmp_path / 'm.onnx', opset=17, size=64, repeats=0)
    assert '\n' not in str(e.value)
    assert (tmp_path / 'm.onnx').read_text() == 'old' and os.listdir(tmp_path) == ['m.onnx']


class _Unusable(nn.Module):
    num_classes = 2

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits(x)


def test_models_that_cannot_be_exported(tmp_path):
    path = tmp_path / 'm.onnx'
    with pytest.raises(ValueError, match='no logits'):
        export_onnx(_Unusable(lambda x: x), path, size=16)
    with pytest.raises(RuntimeError, match='not finite'):
        export_onnx(_Unusable(lambda x: x.flatten(1)[:, :2] * float('nan')), path, size=16, repeats=0)
    # depends on the values of the images (noise is beyond 2.7, pictures are not), which neither exporter follows
    unlike = _Unusable(lambda x: x.flatten(1)[:, :2] * (1 if x.abs().max().item() > 2.7 else 2))
    with pytest.raises(RuntimeError, match=r"'_Unusable' cannot be exported|differs") as e:
        export_onnx(unlike, path, size=16, repeats=0)
    assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize('missing', [('onnx',), ('onnxruntime', 'onnxscript')])
def test_missing_packages(tmp_path, monkeypatch, missing):
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None if name in missing else find_spec(name))
    with pytest.raises(RuntimeError, match=rf'needs {", ".join(missing)}, .*timm_bilinear\[onnx\]'):
        export_onnx(create(), tmp_path / 'm.onnx')


@pytest.mark.parametrize(
    'file, kwargs, error, message',
    [
        ('.', {}, OSError, 'folder'),
        ('no/where.onnx', {}, FileNotFoundError, "folder of '.*where.onnx'"),
        ('m.onnx', dict(opset=12), ValueError, "'opset'.*12"),
        ('m.onnx', dict(opset=99), ValueError, "'opset'.*99"),
        ('m.onnx', dict(opset='17'), TypeError, "'opset'"),
        ('m.onnx', dict(repeats=-1), ValueError, "'repeats'"),
        ('m.onnx', dict(size=0), ValueError, "'size'.*got 0"),
        ('m.onnx', dict(size='64'), TypeError, "'size'"),
        ('m', {}, ValueError, r"'file'.*ends in \.onnx"),
        ('-', {}, ValueError, r"'file'.*ends in \.onnx"),
        ('m.onnx', dict(repeats=1.5), TypeError, "'repeats'"),
        ('m.onnx', dict(size=(64, 64, 3)), ValueError, "'size'"),
        ('m.onnx', dict(image='gone.png'), ValueError, "'gone.png'"),
        ('m.onnx', dict(label_names=['a']), ValueError, "'label_names'"),
    ],
)
def test_wrong_arguments(tmp_path, file, kwargs, error, message):
    with pytest.raises(error, match=message):
        export_onnx(create(), tmp_path / file, **kwargs)
    assert os.listdir(tmp_path) == []


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_MOST_BYTES', 1000)
    with pytest.raises(ValueError, match='GiB'):
        export_onnx(create(), tmp_path / 'm.onnx')


def test_command_says_what_it_wrote(tmp_path, capfd):
    """And nothing else: exporters talk."""
    folder = save_model(create(), tmp_path / 'model', NAMES, dict(input_size=(3, 64, 64)))
    assert run_export(folder, tmp_path / 'm.onnx', repeats=1) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) == 2
    assert "m.onnx'" in out and 'input (batch, 3, 64, 64)' in out and 'onnxruntime' in out and 'eager' in out
