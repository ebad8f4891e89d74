"""Export to ONNX, with class names and preprocessing in the file, checked in onnxruntime before it gets its name."""

import copy
import importlib.util
import io
import json
import logging
import os
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform
from timm.utils import unwrap_model
from torch import nn

from ..data.images import open_image
from ..hub.labels import given_names
from ..hub.partial import partial_path
from ..models.image_modes import IMG_MODES
from .inference import label_descriptions, label_names, load, model_name, view_data_config, whole_number

__all__ = ['export_onnx', 'preprocessing', 'run_export']

_INPUT, _OUTPUT = 'image', 'logits'
# The largest file that protobuf can hold, less what the graph takes.
_MOST_BYTES = 2**31 - 2**24
# Largest difference to eager PyTorch, as a part of the largest logit. Both compute in float32, in another order.
_TOLERANCE = 1e-3
# TorchScript's exporter is for opsets before this one, to which the newer exporter does not go down.
_FIRST_DYNAMO_OPSET = 18
_FIRST_OPSET = 14  # the first with all that attention needs


def _check_installed():
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"Export needs {', '.join(missing)}, which 'pip install timm_bilinear[onnx]' brings.")


def _check_target(file: Union[str, Path]) -> Path:
    if not isinstance(file, (str, os.PathLike)):
        raise TypeError(f"'file' must be the name of a file, got {file!r}.")
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"'file' must be a file, '{file}' is a folder.")
    if path.suffix.lower() != '.onnx':
        raise ValueError(f"'file' must have a name that ends in .onnx, got '{file}'.")
    path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of '{file}' does not exist.")
    if os.path.lexists(path) and not path.is_file():  # which would be replaced by one
        raise ValueError(f"'file' must be a file, '{file}' is a device, a pipe or a socket.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"'{file}' cannot be written.")
    return path


def _input_size(config: Dict[str, Any], size: Optional[Union[int, Sequence[int]]]) -> Tuple[int, int, int]:
    channels, *own = config['input_size']
    wanted = own if size is None else list(size) if isinstance(size, (list, tuple)) else [size]
    wanted = wanted * 2 if len(wanted) == 1 else wanted
    if len(wanted) != 2:
        raise ValueError(f"'size' must be a height and width in pixels, got {size!r}.")
    return (channels, *(whole_number('size', edge, 1) for edge in wanted))


def preprocessing(config: Dict[str, Any]) -> str:
    """What is to be done with an image before it goes into the model, for people.

    Args:
        config: Data config, as of `view_data_config`.
    """
    channels, height, width = config['input_size']
    end = 'NCHW, float32. Output: logits, whose softmax are probabilities.'
    if channels not in IMG_MODES:
        return (
            f'How images get {channels} channels, and values that mean and std are of, is not known; height and width'
            f' {height} x {width}; subtract mean, divide by std; {end}'
        )
    edges = ' x '.join(str(int(edge / config['crop_pct'])) for edge in (height, width))
    how = {
        'squash': f'resize to {edges} whatever its proportions',
        'border': f'resize to fit into {edges}, fill the rest with the mean',
    }.get(config['crop_mode'], f'resize to cover {edges}')
    return (
        f'Turn the image upright (EXIF) and read it as {IMG_MODES[channels]} with 8 bits, what is'
        f' transparent on white; {how} ({config["interpolation"]}); crop the central {height} x {width};'
        f' divide by 255, subtract mean, divide by std; {end}'
    )


def _metadata(model: nn.Module, config: Dict[str, Any]) -> Dict[str, str]:
    names, described = label_names(model), label_descriptions(model)
    values = dict(
        names=names,
        **({} if described == names else {'descriptions': described}),
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        color_mode=IMG_MODES.get(config['input_size'][0], ''),
        preprocessing=preprocessing(config),
        model=model_name(model),
        timm_bilinear_version=version('timm_bilinear'),
        timm_version=timm.__version__,
    )
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _picture(width: int = 640, height: int = 480) -> Image.Image:
    """A picture with edges, colours and smooth parts, where the user gives none."""
    ramps = [Image.linear_gradient('L').resize((width, height)), Image.radial_gradient('L').resize((width, height))]
    picture = Image.merge('RGB', (*ramps, ramps[0].transpose(Image.Transpose.ROTATE_180)))
    draw = ImageDraw.Draw(picture)
    for i in range(12):
        x, y = 53 * i, (97 * i) % height
        draw.ellipse(
            (x, y, x + 60 + 5 * i, y + 45), fill=((40 * i) % 256, 255 - 20 * i, (90 * i) % 256), outline='black'
        )
        draw.line((x, 0, width - x, height), fill='white', width=1 + i % 4)
    return picture


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which exporters, whose errors are told in one sentence, print and log nothing."""
    loggers = [logging.getLogger(name) for name in ('onnxscript', 'onnx_ir', 'torch.onnx')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _export(model: nn.Module, example: torch.Tensor, path: Path, opset: Optional[int]) -> str:
    """Write the file with the first exporter that can; returns its name."""
    common = dict(input_names=[_INPUT], output_names=[_OUTPUT], opset_version=opset, verbose=False)
    axes = {_INPUT: {0: 'batch'}, _OUTPUT: {0: 'batch'}}
    dynamic = dict(dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    ways = [('torch.export', dynamic), ('TorchScript', dict(dynamo=False, dynamic_axes=axes))]
    if opset is not None and opset < _FIRST_DYNAMO_OPSET:
        ways = ways[1:]
    problems: List[str] = []
    for name, options in ways:
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(model, (example,), str(path), **options, **common)
            return name
        except Exception as e:  # exporters raise whatever the model leads them to
            if isinstance(e, OSError) and e.errno is not None:
                raise
            problems.append(f'{name}: {(str(e).strip() or type(e).__name__).splitlines()[0]}')
    raise RuntimeError(f"'{model_name(model)}' cannot be exported to ONNX ({'; '.join(problems)}).")


def _write_metadata(path: Path, metadata: Dict[str, str], opset: Optional[int]) -> int:
    """Put metadata into the file; returns its opset."""
    import onnx

    onnx_model = onnx.load(str(path))
    onnx.helper.set_model_props(onnx_model, metadata)
    onnx_model.producer_name = 'timm_bilinear'
    onnx_model.producer_version = metadata['timm_bilinear_version']
    onnx.checker.check_model(onnx_model)
    onnx.save(onnx_model, str(path))
    found = next(entry.version for entry in onnx_model.opset_import if entry.domain in ('', 'ai.onnx'))
    if opset is not None and found != opset:
        raise RuntimeError(f"it has opset {found}, not 'opset' {opset}")
    return found


def _session(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.contiguous().numpy()})[0])


def _largest_difference(model: nn.Module, run: Callable, images: torch.Tensor) -> float:
    """Largest difference of the exported model's logits to those of the model, as a part of the largest of them.

    Raises:
        RuntimeError: If it is more than rounding.
    """
    where = f'at batch size {len(images)}'
    expected = model(images).float()
    try:
        found = run(images).float()
    except Exception as e:  # onnxruntime has its own errors
        reason = ' '.join(str(e).split())[:300].rstrip('.')
        raise RuntimeError(f'The exported model is not usable {where}: {reason}. Nothing was written.') from e
    if found.shape == expected.shape and torch.equal(found.isneginf(), expected.isneginf()):  # classes that are masked
        expected, found = (logits.masked_fill(logits.isneginf(), 0.0) for logits in (expected, found))
    if found.shape != expected.shape or not expected.isfinite().all() or not found.isfinite().all():
        shapes = f'{tuple(found.shape)}, not {tuple(expected.shape)}'
        reason = f'it gives {shapes}' if found.shape != expected.shape else 'logits are not finite'
        raise RuntimeError(f'The exported model is not usable {where}: {reason}. Nothing was written.')
    difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
    if difference > _TOLERANCE:
        raise RuntimeError(
            f'The exported model differs from the model {where}: by {difference:.1g} of the largest logit.'
            ' Nothing was written.'
        )
    return difference


def _images_per_second(model: nn.Module, run: Callable, images: torch.Tensor, repeats: int) -> Dict[str, float]:
    """Medians of interleaved runs."""
    seconds: Dict[str, List[float]] = {'eager': [], 'onnxruntime': []}
    for number in range(repeats + 1):
        for name, function in (('eager', model), ('onnxruntime', run)):
            start = time.perf_counter()
            function(images)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: len(images) / median(times) for name, times in seconds.items() if times}


def export_onnx(
    model: Union[str, Path, nn.Module],
    file: Union[str, Path],
    opset: Optional[int] = None,
    size: Optional[Union[int, Sequence[int]]] = None,
    image: Optional[Any] = None,
    label_names: Union[Sequence[str], Dict[Any, Any], str, Path, None] = None,
    repeats: int = 5,
) -> Dict[str, Any]:
    """Export a model to ONNX: float32, with any batch size, from preprocessed images to logits.

    The file is compared in onnxruntime with the model, on noise and on a picture, at batch sizes of 1 and 3, and gets
    its name afterwards; if anything fails, a file that was there stays. Its metadata (strings, lists as JSON) are
    'names', 'descriptions' where classes have them, 'input_size' (C, H, W), 'mean', 'std', 'interpolation',
    'crop_pct', 'crop_mode', 'color_mode', 'preprocessing' (in words), 'model', 'timm_bilinear_version',
    'timm_version'.

    Args:
        model: What `load` takes. A module is left as it is.
        file: File to write, whose name ends in .onnx.
        opset: ONNX operator set, PyTorch's default if None. Before 18 TorchScript's exporter is used.
        size: Height and width of the images, as a number or two, the model's own if None.
        image: Picture to compare on, what `open_image` takes; one is drawn if None.
        label_names: Class names in the order of the logits, {index: name}, or a file of them, instead of the model's.
        repeats: Runs of each kind to measure its speed; 0 measures nothing.

    Returns:
        'file', 'bytes', 'opset', 'exporter', 'input_size', 'difference' (the largest, as a part of the largest logit),
        and images per second at batch size 1 on this machine's CPU: 'eager' and 'onnxruntime'.

    Raises:
        OSError: If the model cannot be loaded or the file not be written.
        RuntimeError: If onnx, onnxruntime or onnxscript are missing, the model cannot be exported, or the exported
            model is not the same.
        TypeError: If an argument is something else than it should be.
        ValueError: If an argument is wrong, the model has no classifier, or does not take images of this size.
    """
    path = _check_target(file)
    _check_installed()
    import onnx

    if opset is not None:
        opset = whole_number('opset', opset, _FIRST_OPSET, onnx.defs.onnx_opset_version())
    repeats, given = whole_number('repeats', repeats, 0), given_names(label_names)
    # a module of the user's stays as it is
    net = copy.deepcopy(unwrap_model(model)) if isinstance(model, nn.Module) else load(model, 'cpu')
    net = load(net.float().cpu().to(memory_format=torch.contiguous_format), 'cpu', given)
    net = net.to(memory_format=torch.contiguous_format)
    if getattr(unwrap_model(net), 'num_classes', None) == 0:
        raise ValueError("'model' has no classifier (num_classes is 0), so there are no logits to export.")
    config = view_data_config(net)
    config['input_size'] = _input_size(config, size)
    count = sum(p.numel() * p.element_size() for p in (*net.parameters(), *net.buffers()))
    if count > _MOST_BYTES:
        raise ValueError(f'The weights are {count / 2**30:.1f} GiB, an ONNX file can hold less than 2.')
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(3, *config['input_size'], generator=random)
    picture = _picture() if image is None else image
    picture = open_image(picture, IMG_MODES.get(config['input_size'][0], 'RGB'))
    if config['input_size'][0] in IMG_MODES:
        seen = create_transform(**config, is_training=False)(picture)
        pictures = torch.stack([seen, seen.flip(-1), seen.flip(-2)])
    else:
        pictures = noise.abs()
    with torch.inference_mode():
        try:
            out = net(noise[:1])
        except Exception as e:
            reason = ' '.join(str(e).split()) or type(e).__name__
            raise ValueError(f"'{model_name(net)}' does not take images of {config['input_size']}: {reason}") from e
        if not isinstance(out, torch.Tensor) or out.ndim != 2:
            raise ValueError(f"'{model_name(net)}' gives no logits (B, K).")
    with partial_path(path.parent, f'.{path.name[:50]}.', '.partial') as partial:
        exporter = _export(net, noise[:2], partial, opset)
        try:
            found = _write_metadata(partial, _metadata(net, config), opset)
            run = _session(partial)
        except Exception as e:  # onnx and onnxruntime have their own errors
            if isinstance(e, OSError) and e.errno is not None:
                raise
            reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
            raise RuntimeError(
                f"The exported '{model_name(net)}' is not usable ({reason}). Nothing was written."
            ) from e
        with torch.inference_mode():
            batches = (noise[:1], noise, pictures[:1], pictures)
            difference = max(_largest_difference(net, run, images) for images in batches)
            speed = _images_per_second(net, run, pictures[:1], repeats)
        os.replace(partial, path)
    return dict(
        file=str(file),
        bytes=path.stat().st_size,
        opset=found,
        exporter=exporter,
        input_size=config['input_size'],
        difference=difference,
        **speed,
    )


def run_export(model: Union[str, Path, nn.Module], file: Union[str, Path], **settings: Any) -> int:
    """Export, and print what was written and how fast it is; arguments as of `export_onnx`.

    Returns:
        Exit code, 0.
    """
    result = export_onnx(model, file, **settings)
    channels, height, width = result['input_size']
    print(
        f"'{result['file']}': {result['bytes'] / 2**20:.1f} MiB, opset {result['opset']} ({result['exporter']}),"
        f' input (batch, {channels}, {height}, {width}), within {result["difference"]:.0e} of the model.'
    )
    if 'eager' in result:
        threads = torch.get_num_threads()
        print(
            f'onnxruntime {result["onnxruntime"]:.1f} images/s, eager PyTorch {result["eager"]:.1f}'
            f' (batch size 1, CPU, {threads} thread{"s" * (threads != 1)}).'
        )
    return 0
