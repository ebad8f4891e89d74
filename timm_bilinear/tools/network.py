"""The network of a run: made, started from weights, tried out, kept in a checkpoint and made again from it."""

import copy
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from timm.models import get_model_args, list_models, load_state_dict, resolve_model_input_args
from torch import nn

from ..hub import save_model
from .settings import Settings

__all__ = ['check_network', 'create_network', 'describe_network', 'rebuild_network', 'try_out']

# Where the weights of a classifier are in the checkpoints that a bilinear CNN takes: ours, the article's, the authors'.
_CLASSIFIERS = ('head.fc.weight', 'classifiers.0.weight', 'fc.weight', 'classifier.weight')
# What timm raises of arguments that do not fit a model, beside ValueError, TypeError and RuntimeError.
_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError)


def _one_line(e: BaseException) -> str:
    return ' '.join(str(e).split()).rstrip('.') or type(e).__name__


def _damage(file: Path, error: Exception) -> str:
    """What is wrong with a file of weights, which its reader says in words for programmers."""
    with file.open('rb') as f:
        start = f.read(2)
    objects = re.search(r'Unsupported globals: (.*?)\. ', str(error))
    if not start:
        return 'it is empty'
    if isinstance(error, (AttributeError, TypeError)):
        return 'it holds no tensors by name'
    if file.suffix == '.safetensors':
        return 'it is cut off, or no file of safetensors'
    if objects is not None:
        return f'it holds more than tensors ({objects[1]}), which is not loaded'
    if start == b'PK' or start[:1] == b'\x80':  # zip files and pickles
        return 'it is cut off, damaged, or holds no tensors by name'
    return 'it is no file of torch.save; those of safetensors end in .safetensors'


def _misfit(error: Exception) -> str:
    """What of weights does not fit, of the error of who loads them, without what is for who calls timm."""
    text = re.sub(r'^The checkpoint does not fit this \w+: | \(The checkpoint was taken .*', '', _one_line(error))
    return textwrap.shorten(text.rstrip('.'), 400, placeholder=' ...')


def _count_classes(file: Path, classifiers: Tuple[str, ...]) -> Optional[int]:
    """Number of classes of the weights in a file, None if its classifier has none of the names."""
    try:
        if file.stat().st_size == 0:
            raise EOFError
        state_dict = load_state_dict(str(file))
        shapes = {key.removeprefix('module.'): value.shape for key, value in state_dict.items()}
        if not shapes:
            raise TypeError
    except Exception as e:  # safetensors, pickle and zip files each have errors of their own
        raise ValueError(f"'weights': '{file}' cannot be read as weights: {_damage(file, e)}.") from e
    # of more than two dimensions if it is a 1x1 convolution, or of low rank
    return next((shapes[name][0] for name in classifiers if len(shapes.get(name, ())) > 1), None)


def check_network(settings: Settings) -> None:
    """Check what can be without making the model: its name, and that weights are there.

    Raises:
        FileNotFoundError: If there is no such file of weights.
        RuntimeError: If there is no such model.
        ValueError: If an argument does not suit it.
    """
    if 'num_classes' in (settings.model_kwargs or {}):
        raise ValueError("'model_kwargs' must not have 'num_classes': the data say how many there are.")
    if settings.weights is not None and not Path(settings.weights).is_file():
        raise FileNotFoundError(f"'weights': there is no file '{settings.weights}'.")
    try:
        resolve_model_input_args(settings.model, dict(img_size=settings.img_size), **(settings.model_kwargs or {}))
    except _MISFITS as e:
        raise ValueError(f"'model': {settings.model!r} cannot be made ({_one_line(e)}).") from e
    except RuntimeError as e:
        raise RuntimeError(f"'model': timm has no model {settings.model!r} ({_one_line(e)}).") from e


def create_network(settings: Settings, num_classes: int) -> Tuple[nn.Module, Dict[str, Any]]:
    """Make the model that a run trains.

    Args:
        settings: Its 'model', 'model_kwargs', 'img_size', 'pretrained' and 'weights' count.
        num_classes: Number of classes.

    Returns:
        The model, and its arguments for `timm.create_model`.

    Raises:
        FileNotFoundError: If there is no such file of weights.
        RuntimeError: If there is no such model, or weights cannot be had or do not fit.
        TypeError: If the model has no such argument.
        ValueError: If an argument does not suit the model.
    """
    check_network(settings)
    kwargs = dict(settings.model_kwargs or {})
    weights = None if settings.weights is None else Path(settings.weights)
    try:
        args = resolve_model_input_args(settings.model, dict(img_size=settings.img_size), **kwargs)
        is_bilinear = args['model_name'] in list_models(module='bcnn')
        if is_bilinear and settings.img_size is not None:
            args['img_size'] = settings.img_size  # its streams may be built for one size
        overlay = None
        if weights is not None:
            classifier = args['pretrained_cfg'].get('classifier')
            own = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
            classifiers = _CLASSIFIERS if is_bilinear else tuple(f'{name}.weight' for name in own)
            classes = _count_classes(weights, classifiers)
            overlay = dict(file=str(weights), source=None, url=None, hf_hub_id=None, state_dict=None)
            overlay.update({} if classes is None else dict(num_classes=classes))
        args['num_classes'] = num_classes  # a saved model has its own among its arguments
        name = args.pop('model_name')
        try:
            net = timm.create_model(name, pretrained=settings.from_weights, pretrained_cfg_overlay=overlay, **args)
        except (*_MISFITS, RuntimeError, TypeError, ValueError) as e:
            if weights is None:
                raise
            timm.create_model(name, pretrained=False, **args)  # if this fails too, it is not the weights
            raise ValueError(f"'weights': '{weights}' does not fit {settings.model}: {_misfit(e)}.") from e
    except _MISFITS as e:
        raise ValueError(f"'model': {settings.model!r} cannot be made with these arguments ({_one_line(e)}).") from e
    if weights is not None and not is_bilinear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() + 1)
            again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).state_dict()
        # timm starts with random numbers where a file has nothing, which differ then
        fresh = [key for key, value in net.state_dict().items() if not torch.equal(value, again[key])]
        missing = [key for key in fresh if not key.startswith(tuple(f'{name}.' for name in own))]
        if missing:
            told = textwrap.shorten(', '.join(missing), 400, placeholder=' ...')
            raise ValueError(f"'weights': '{weights}' does not fit {settings.model}: it has no {told}.")
    if weights is not None:
        net.pretrained_cfg['file'] = None
    return net, args


def describe_network(net: nn.Module, args: Dict[str, Any]) -> Dict[str, Any]:
    """What a checkpoint says of a model, so that it can be made again though what it started from is gone.

    Args:
        net: The model.
        args: Arguments that it was made with, whose drop rates count: timm keeps none.

    Returns:
        'arch', 'model_args' for `timm.create_model`, 'num_classes', and 'pretrained_cfg'.
    """
    model_args = get_model_args(net)
    model_args.update({k: v for k, v in args.items() if k.endswith(('drop_rate', 'drop_path_rate', 'drop_block_rate'))})
    cfg = {k: v for k, v in net.pretrained_cfg.items() if k not in ('file', 'source', 'state_dict')}
    return dict(
        arch=net.pretrained_cfg['architecture'],
        model_args=dict(model_args, num_classes=net.num_classes),
        num_classes=net.num_classes,
        pretrained_cfg=copy.deepcopy(cfg),
    )


def rebuild_network(checkpoint: Dict[str, Any]) -> nn.Module:
    """Make the model of a checkpoint, with its weights."""
    cfg = copy.deepcopy(checkpoint['pretrained_cfg'])
    net = timm.create_model(checkpoint['arch'], pretrained=False, **checkpoint['model_args'])
    net.pretrained_cfg = cfg
    net.load_state_dict(checkpoint['state_dict'])
    return net


@torch.inference_mode()
def try_out(
    net: nn.Module,
    folder: Union[str, Path],
    label_names: List[str],
    data_config: Dict[str, Any],
    train_size: Optional[int] = None,
) -> None:
    """Save the model, load it back, and compare what the two say of two images: what is to come after training.

    Args:
        net: The model; it is left as it was.
        folder: New folder for the files, which are removed again.
        label_names: Names of its classes.
        data_config: Its preprocessing.
        train_size: Height and width of the images in training, if other than those in `data_config`.

    Raises:
        OSError: If the files cannot be written.
        ValueError: If the model does not take images of these sizes.
        RuntimeError: If what is saved does not give the model back.
    """
    folder = Path(folder)
    channels, *size = data_config['input_size']
    device = next(net.parameters()).device
    was_training = net.training
    try:
        save_model(net, folder, label_names, data_config)
        net.eval()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, channels, *size, generator=generator)
        for height, width in {tuple(size), (train_size, train_size) if train_size else tuple(size)}:
            try:
                net(torch.zeros(2, channels, height, width, device=device))
            except (*_MISFITS, RuntimeError, ValueError) as e:
                raise ValueError(f'The model does not take images of {height} x {width} ({_one_line(e)}).') from e
        with torch.random.fork_rng(devices=[]):
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device).eval()
        logits, again = net(images.to(device)), loaded(images.to(device))
        if not torch.allclose(logits, again, rtol=1e-3, atol=1e-4 * (1 + logits.abs().max().item()), equal_nan=True):
            raise RuntimeError('The model cannot be saved: what is loaded back computes something else.')
    finally:
        net.train(was_training)
        shutil.rmtree(folder, ignore_errors=True)
