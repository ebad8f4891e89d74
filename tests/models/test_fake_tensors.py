"""Models that are built or run with fake tensors first, and with real ones then, or the other way round."""

import pytest
import timm
import torch
from small_models import ONE, create, images
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.usefixtures('clean_up')


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('pool_type', ['avg', 'max'])
def test_built_and_run_with_fake_tensors(device, pool_type):
    kwargs = dict(ONE, backbone_b='test_resnet', proj_dim=11, pool_type=pool_type)
    with FakeTensorMode(), torch.device(device):
        for model in (timm.create_model('test_resnet', num_classes=5), create(**kwargs)):
            assert model.eval()(images(size=64)).shape == (2, 5)
    model = create(**kwargs)
    want = model(images(size=64))
    assert type(want) is torch.Tensor and want.isfinite().all()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(3, 3, 64, 64)).shape == (3, 5)
    assert torch.compile(model, backend='aot_eager')(images(size=64)).shape == (2, 5)
