"""Images per second on this machine, before and after: what a plain loop around timm does, and what this package does.

python hub/recipes/images_per_second.py --output docs/images_per_second.md

Training steps at 448 px in NCHW float32, in channels-last float32 and in what `--amp auto` takes; prediction from large
JPEG files by timm's transform, file after file, and by `predict`. Contestants take turns, medians count.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Callable, Dict, List

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from timm_bilinear.tools.inference import autocast, resolve_amp_dtype
from timm_bilinear.tools.measure import describe_machine, markdown_table, measure_seconds, write
from timm_bilinear.tools.predict import predict

_CPU = torch.device('cpu')


def _training_steps(name: str, batch_size: int) -> Dict[str, Callable[[], None]]:
    def create_step(memory_format: torch.memory_format, amp: str) -> Callable[[], None]:
        net = timm.create_model(name, num_classes=200).train().to(memory_format=memory_format)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        images = torch.randn(batch_size, 3, 448, 448).to(memory_format=memory_format)
        targets = torch.arange(batch_size) % 200
        amp_dtype = resolve_amp_dtype(amp, _CPU)

        def step() -> None:
            with autocast(_CPU, amp_dtype):
                logits = net(images)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), targets).backward()
            optimizer.step()

        return step

    steps = {
        'NCHW, float32': create_step(torch.contiguous_format, 'float32'),
        'channels-last, float32': create_step(torch.channels_last, 'float32'),
    }
    if resolve_amp_dtype('auto', _CPU) is not None:
        steps['channels-last, bfloat16 (`--amp auto`)'] = create_step(torch.channels_last, 'auto')
    return steps


def _draw_photos(folder: Path, count: int) -> List[Path]:
    """JPEG files of 12 megapixels with details of every size."""
    paths = []
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        image = torch.zeros(1, 3, 3000, 4000)
        for edge in (12, 96, 768):
            noise = torch.rand(1, 3, edge * 3 // 4, edge, generator=generator)
            image += F.interpolate(noise, (3000, 4000), mode='bilinear')
        pixels = (255 / 3 * image[0]).byte().permute(1, 2, 0).contiguous().numpy()
        paths.append(folder / f'{i}.jpg')
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def _predictions(net: nn.Module, paths: List[Path]) -> Dict[str, Callable[[], None]]:
    net = net.eval()
    fast = timm.create_model(net.pretrained_cfg['architecture'], num_classes=net.num_classes).eval()
    fast = fast.to(memory_format=torch.channels_last)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)

    def plain() -> None:
        with torch.inference_mode():
            for path in paths:
                net(transform(Image.open(path).convert('RGB')).unsqueeze(0)).softmax(1).topk(5)

    def ours() -> None:
        predict(fast, paths)

    return {"timm's transform, file after file, NCHW float32": plain, '`predict`': ours}


def measure(models: List[str], batch_size: int, photos: int, repeats: int) -> str:
    """The page, a table of both jobs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = _draw_photos(Path(folder), photos)
        for name in models:
            net = timm.create_model(name, num_classes=200)
            for job, count, ways in (
                (f'training, batch of {batch_size}', batch_size, _training_steps(name, batch_size)),
                (f'prediction, {photos} files of 12 MP', photos, _predictions(net, paths)),
            ):
                seconds = measure_seconds(ways, repeats, _CPU)
                slowest = next(iter(seconds.values()))
                for way, value in seconds.items():
                    rows.append([f'`{name}`', job, way, f'{count / value:.2f}', f'{slowest / value:.2f} x'])
    return (
        f'# Images per second\n\n`python hub/recipes/images_per_second.py`, 448 px, medians of {repeats}.'
        f' {describe_machine(_CPU)}.\n\n' + markdown_table(['model', 'job', 'way', 'images/s', 'speed'], rows)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['bcnn_resnet18'])
    parser.add_argument('--batch-size', type=int, default=8, help='images in a training step (default: %(default)s)')
    parser.add_argument('--photos', type=int, default=16, help='files to predict (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--output', type=Path, help='file for the table')
    args = parser.parse_args()
    print(write(measure(args.models, args.batch_size, args.photos, args.repeats), args.output))


if __name__ == '__main__':
    main()
