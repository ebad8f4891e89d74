"""Images, models and comparisons that the tests of fine-tuning share."""

import hashlib
from pathlib import Path

import torch
from PIL import Image

MODEL = dict(model='bcnn', model_kwargs=dict(backbone_a='test_resnet', out_index_a=2))
SMALL = dict(MODEL, img_size=32, batch_size=8, pretrained=False, workers=0, log_format='text')


def make_images(root: Path, counts=(16, 8, 8), names=('rows', 'columns'), size=48) -> Path:
    """Textures that colour does not tell apart: horizontal and vertical stripes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in zip(('train', 'val', 'test'), counts):
        for i, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (0.5 + 0.5 * torch.rand(3, generator=generator))[:, None]
                stripes = colour * (torch.arange(size) // (4 + i // 2) % 2)
                image = stripes.unsqueeze(2 - i % 2).expand(3, size, size)
                array = (255 * image).byte().permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(array).save(folder / f'{number}.png')
    return root


def digests(folder: Path) -> dict:
    """What a run leaves that is the same bit for bit, however often it was killed."""
    names = ('model.safetensors', 'config.json', 'summary.csv', 'results.json', 'curves.png', 'args.yaml')
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def assert_same_checkpoints(a: Path, b: Path):
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        _assert_same(*(torch.load(folder / 'checkpoints' / name, weights_only=True) for folder in (a, b)), name)


def _assert_same(a, b, place: str):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            _assert_same(a[key], b[key], f'{place} {key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b)):
            _assert_same(x, y, f'{place} {i}')
    else:
        assert a == b, place
