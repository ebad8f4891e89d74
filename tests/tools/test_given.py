"""What callers give as names, numbers and modules, and what is said of precision, splits and masked classes."""

import json
import math
import time

import numpy as np
import pytest
import timm
import torch
from evaluation_cases import NAMES, Nearest, read_csv, run, write
from huggingface_hub import constants
from PIL import Image

from timm_bilinear.tools import loading
from timm_bilinear.tools.evaluate import format_metrics
from timm_bilinear.tools.export import export_onnx, preprocessing
from timm_bilinear.tools.inference import load, precision, view_data_config, whole_number
from timm_bilinear.tools.predict import predict, run_predict


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / 'data')


@pytest.fixture
def image():
    return Image.new('RGB', (40, 30), 'red')


def create(num_classes=3, **kwargs):
    return timm.create_model('test_resnet', num_classes=num_classes, **kwargs).eval()


def test_label_names_of_any_kind(data, image, tmp_path):
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES))
    for names in (dict(enumerate(NAMES)), tuple(NAMES), tmp_path / 'names.txt', str(tmp_path / 'names.txt')):
        assert run(Nearest(names=None), data, label_names=names)['top1'] == run(Nearest(), data)['top1']
    (result,) = predict(create(), image, label_names={'2': 'z', '0': 'x', '1': 'y'}, workers=0)
    assert {p['index']: p['name'] for p in result['predictions']} == {0: 'x', 1: 'y', 2: 'z'}
    for use in (predict, lambda model, image, **kwargs: export_onnx(model, tmp_path / 'm.onnx', **kwargs)):
        with pytest.raises(TypeError, match="'label_names' must be a list"):
            use(create(), image, label_names=5)
    export_onnx(create(), tmp_path / 'm.onnx', size=32, opset=17, repeats=np.int64(0), label_names={1: 'b', 0: 'a'})
    import onnx

    told = {prop.key: prop.value for prop in onnx.load(tmp_path / 'm.onnx').metadata_props}
    assert json.loads(told['names']) == ['a', 'b', '2']


def test_evaluation_leaves_a_module_as_it_was(data):
    model = Nearest().train()
    before, cfg = [m.training for m in model.modules()], dict(model.pretrained_cfg)
    run(model, data, label_names=NAMES[::-1])
    assert [m.training for m in model.modules()] == before and model.pretrained_cfg == cfg
    with pytest.raises(ValueError, match='zebra'):
        run(model, write(data.parent / 'other', {'zebra': [3]}), label_names=NAMES[::-1])
    assert model.training and model.pretrained_cfg == cfg


def test_a_module_without_config_gets_none(image):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).train()
    predict(model, image, workers=0, label_names=['r', 'g', 'b'])
    assert model.training and not hasattr(model, 'pretrained_cfg')


def test_numbers_of_numpy(data, image):
    (result,) = predict(create(), image, topk=np.int64(2), batch_size=np.int32(4), workers=np.int64(0))
    assert len(result['predictions']) == 2
    metrics = run(Nearest(), data, batch_size=np.int64(5), workers=np.int64(0), worst=np.int8(1), pairs=np.uint8(0))
    assert metrics['images'] == 13
    assert whole_number('n', np.int64(3), 1) == 3 and type(whole_number('n', np.int64(3), 1)) is int
    for value in (True, 1.0, np.float64(2), '3', None):
        with pytest.raises(TypeError, match="'n' must be a whole number of 1 to 9"):
            whole_number('n', value, 1, 9)
    for value in (0, 10):
        with pytest.raises(ValueError, match=f"'n' must be 1 to 9, got {value}"):
            whole_number('n', value, 1, 9)


@pytest.mark.parametrize('device', [3.4, 'gpu', '', ['cpu']])
def test_device_is_named(image, device):
    with pytest.raises(ValueError, match="'device'") as e:
        predict(create(), image, device=device)
    assert '\n' not in str(e.value)


def test_precision_of_the_weights(data, image, tmp_path, capfd):
    assert precision(create(), None) == 'float32' and precision(create(), torch.float16) == 'float16'
    assert precision(torch.nn.Flatten(), None) == 'float32'
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=7).bfloat16()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32))
    assert run(model, data, amp='float32', label_names=NAMES)['amp'] == 'bfloat16'
    image.save(tmp_path / 'i.png')
    run_predict(model, [tmp_path / 'i.png'], amp='float32')
    assert 'in bfloat16, 1 image\n' in capfd.readouterr().err


class Masked(Nearest):
    """Has no probability for some of its classes."""

    def forward(self, x):
        logits = super().forward(x).clone()
        logits[:, self.masked] = -math.inf
        return logits


@pytest.mark.parametrize('masked', [[4], [0, 4]])
@pytest.mark.parametrize('tta', [None, 'flip'])
def test_masked_classes(data, tmp_path, masked, tta):
    model = Masked()
    model.masked = masked
    metrics = run(model, data, output=tmp_path / 'out', tta=tta)
    unmasked = run(Nearest(), data)
    assert metrics['images'] == 13 and (metrics['top1'] == unmasked['top1']) == (masked == [4])
    written = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    if masked == [4]:
        assert metrics['loss'] == pytest.approx(unmasked['loss'], abs=0.01) and written['loss'] == metrics['loss']
    else:
        assert metrics['loss'] == math.inf and written['loss'] is None and 'loss inf' in format_metrics(metrics)
        assert read_csv(tmp_path / 'out' / 'predictions.csv')[0]['loss'] == 'inf'
    (result,) = predict(model, data / 'bee' / '0.png', topk=9, workers=0, tta=tta)
    assert result['error'] is None and [p['probability'] for p in result['predictions']][-len(masked) :] == [0] * len(
        masked
    )


def test_nothing_but_masked_classes(data):
    model = Masked()
    model.masked = slice(None)
    with pytest.raises(ValueError, match='not finite'):
        run(model, data)


def test_masked_classes_are_exported(tmp_path):
    class Half(torch.nn.Module):
        num_classes = 3

        def forward(self, x):
            logits = x.mean((2, 3))
            return torch.where(torch.tensor([True, False, True]), logits, -math.inf)

    export_onnx(Half(), tmp_path / 'm.onnx', size=16, opset=17, repeats=0)
    assert (tmp_path / 'm.onnx').exists()


@pytest.mark.parametrize('inner,split', [('', None), ('test', 'test'), ('mine', 'mine')])
def test_a_split_that_is_not_there_is_not_told(tmp_path, inner, split):
    write(tmp_path / 'data' / inner if inner else tmp_path / 'data')
    metrics = run(Nearest(), tmp_path / 'data', split=split or 'test', output=tmp_path / 'out')
    assert metrics['split'] == split and json.loads((tmp_path / 'out' / 'metrics.json').read_text())['split'] == split
    assert any('no folders of splits' in note for note in metrics['notes']) == (split is None)


def test_what_timm_prints_is_no_result(data, monkeypatch, capfd):
    create_split = run.__globals__['evaluate'].__globals__['create_split']

    def loud(*args, **kwargs):
        print('Please install something')
        return create_split(*args, **kwargs)

    monkeypatch.setattr('timm_bilinear.tools.evaluate.create_split', loud)
    run(Nearest(), data)
    out, err = capfd.readouterr()
    assert out == '' and 'Please install' in err


@pytest.mark.parametrize('count,said', [(1, '1 of 1 image has no'), (2, '2 of 2 images have no')])
def test_grammar(tmp_path, capfd, count, said):
    assert run_predict(create(), [f'gone{i}' for i in range(count)]) == 1
    assert said in capfd.readouterr().err


def test_export_of_a_model_without_classifier(tmp_path):
    with pytest.raises(ValueError, match="'model' has no classifier"):
        export_onnx(create(0), tmp_path / 'm.onnx')


def test_preprocessing_of_other_channels():
    told = preprocessing(view_data_config(create(in_chans=5)))
    assert '5 channels' in told and 'not known' in told and 'mean' in told and 'EXIF' not in told and '255' not in told
    assert 'EXIF' in preprocessing(view_data_config(create()))


def test_without_a_network(monkeypatch, tmp_path, caplog):
    """The Hub's client would try for half a minute, and say so line by line."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}'
    )
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    for name in ('hf-hub:nobody/nothing', 'test_byobnet'):
        start = time.monotonic()
        with pytest.raises(OSError, match=r'Hub.*cannot be reached'):
            load(name, 'cpu')
        assert time.monotonic() - start < 8
        assert not [r for r in caplog.records if r.name.startswith('huggingface_hub') and r.levelname == 'WARNING']
    assert constants.HF_HUB_OFFLINE is False and loading.constants is constants
