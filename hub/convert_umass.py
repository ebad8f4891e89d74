"""Turn a checkpoint of the authors' PyTorch release (cvl-umass/bilinear-cnn) into a folder in the Hub's layout.

    python hub/convert_umass.py vgg_cub.pth.tar bcnn_vgg16.umass_cub --dataset cub --label-names classes.txt
    timm-bilinear push bcnn_vgg16.umass_cub --repo OWNER/NAME

Streams, projection and number of classes are read off the keys and shapes. Two things leave no trace there and have to
be known: that the pooling was the outer product (not 'gamma_demo'), and how images were cropped (`--dataset`).
"""

import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch

import timm_bilinear  # noqa: F401
from timm_bilinear.hub import save_model

_STREAM = re.compile(r'feature_extractors\.feature_extractors\.([01])\.(?:0\.)?model\.(.+)')
_PROJECTION = 'feature_extractors.feature_extractors.0.1.weight'
# What the checkpoint may hold and no model of this package can be.
_UNSUPPORTED = {
    'm_sqrt.': 'the matrix square root',
    'pooling_fn.': 'a tensor sketch',
    'fc.0.': 'a bottleneck before the classifier (--fc_bottleneck)',
    'fc_list.': 'several heads',
}
# Stages of torchvision's ResNets and dense blocks of its DenseNets, and convolutions of its VGGs.
_RESNETS = {(2, 2, 2, 2): 'resnet18', (3, 4, 6, 3): 'resnet34', (3, 4, 23, 3): 'resnet101', (3, 8, 36, 3): 'resnet152'}
_DENSENETS = {(6, 12, 24, 16): 'densenet121', (6, 12, 32, 32): 'densenet169', (6, 12, 48, 32): 'densenet201'}
_VGGS = {8: 'vgg11', 10: 'vgg13', 13: 'vgg16', 16: 'vgg19'}
# The authors' test.py: the shorter side, or for planes and cars both, to the input size, planes by 8/7 of it.
_CROPS = {
    'cub': dict(crop_pct=1.0, crop_mode='center'),
    'aircrafts': dict(crop_pct=0.875, crop_mode='squash'),
    'cars': dict(crop_pct=1.0, crop_mode='squash'),
}


def _count(keys: List[str], pattern: str) -> tuple:
    """How many different second groups there are for each first group of a pattern."""
    found = sorted({m.groups() for key in keys if (m := re.match(pattern, key))})
    return tuple(sum(first == g for first, _ in found) for g in sorted({first for first, _ in found}))


def backbone_of(keys: List[str]) -> str:
    """timm's name of a torchvision backbone, from its state dict's keys.

    Raises:
        ValueError: If it is none that the authors' extractors, or their like, are made of.
    """
    name: Optional[str] = None
    if any(key.startswith('layer1.') for key in keys):
        name = _RESNETS.get(_count(keys, r'layer(\d)\.(\d+)\.'))
        if name == 'resnet34' and any('conv3' in key for key in keys):
            name = 'resnet50'
    elif any(key.startswith('features.denseblock1.') for key in keys):
        name = _DENSENETS.get(_count(keys, r'features\.denseblock(\d)\.denselayer(\d+)\.'))
    elif 'Mixed_7c.branch1x1.conv.weight' in keys:
        name = 'inception_v3'
    elif all(re.fullmatch(r'\d+\.\w+', key) for key in keys):
        norms = sum(key.endswith('.running_mean') for key in keys)
        name = _VGGS.get(sum(key.endswith('.weight') for key in keys) - norms)
        name = f'{name}_bn' if name and norms else name
    if name is None:
        raise ValueError(f"the backbone with keys such as '{keys[0]}' is not known")
    return name


def model_of(state_dict: Dict[str, torch.Tensor]) -> tuple:
    """timm model name and arguments for a checkpoint's weights.

    Raises:
        ValueError: If no model of this package is like it.
    """
    for prefix, what in _UNSUPPORTED.items():
        if any(key.startswith(prefix) for key in state_dict):
            raise ValueError(f"the model has {what} ('{prefix}...'), which is not supported")
    streams: Dict[str, List[str]] = {}
    for key in state_dict:
        if m := _STREAM.fullmatch(key):
            streams.setdefault(m[1], []).append(m[2])
    if not streams or 'fc.weight' not in state_dict:
        raise ValueError('it has no streams (feature_extractors.feature_extractors...) or no classifier (fc.weight)')
    kwargs: Dict[str, Any] = {}
    for letter, keys in zip('ab', (streams[i] for i in sorted(streams))):
        kwargs[f'backbone_{letter}'] = backbone_of(keys)
        if kwargs[f'backbone_{letter}'].startswith('vgg'):
            kwargs[f'out_index_{letter}'] = 4  # relu5, without pool5
    if _PROJECTION in state_dict:
        kwargs['proj_dim'] = len(state_dict[_PROJECTION])
    named = f'bcnn_{kwargs["backbone_a"]}'
    if len(streams) == 1 and 'proj_dim' not in kwargs and named in ('bcnn_vgg16', 'bcnn_vgg16_bn', 'bcnn_vgg19'):
        return named, {}
    return 'bcnn', kwargs


def convert(
    checkpoint: str,
    output: str,
    dataset: str = 'cub',
    input_size: int = 448,
    label_names: Optional[str] = None,
) -> Path:
    """Convert a checkpoint.

    Args:
        checkpoint: Their .pth.tar file.
        output: New folder for config.json and model.safetensors.
        dataset: 'cub', 'aircrafts' or 'cars': how the authors crop images of it.
        input_size: Height and width in pixels.
        label_names: File with a class name per line.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `output` is not empty.
        OSError: If a file cannot be read or written.
        ValueError: If the checkpoint is none of theirs, or of a model that is not supported.
    """
    if Path(output).exists() and any(Path(output).iterdir()):
        raise FileExistsError(f"'{output}' is not empty")
    try:
        loaded = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"'{checkpoint}' is no checkpoint, or holds more than weights and numbers") from e
    except (RuntimeError, EOFError, LookupError, ValueError) as e:
        raise ValueError(f"'{checkpoint}' is not a checkpoint that can be read") from e
    state_dict = loaded.get('state_dict') if isinstance(loaded, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(f"'{checkpoint}' has no state_dict")
    state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    try:
        name, kwargs = model_of(state_dict)
    except ValueError as e:
        raise ValueError(f"'{checkpoint}': {e}") from None
    classes = len(state_dict['fc.weight'])
    labels = Path(label_names).read_text().splitlines() if label_names else None
    if labels is not None and len(labels) != classes:
        raise ValueError(f"'{label_names}' names {len(labels)} classes, '{checkpoint}' has {classes}")
    model = timm.create_model(
        name,
        pretrained=True,
        num_classes=classes,
        eps=1e-5,
        pretrained_cfg_overlay=dict(state_dict=state_dict, num_classes=classes),
        **kwargs,
    )
    data_config = dict(input_size=(3, input_size, input_size), interpolation='bilinear', **_CROPS[dataset])
    return save_model(model, output, labels, data_config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint')
    parser.add_argument('output', help='new folder')
    parser.add_argument('--dataset', choices=_CROPS, default='cub', help='how images were cropped (default: cub)')
    parser.add_argument('--input-size', type=int, default=448, help='pixels (default: 448)')
    parser.add_argument('--label-names', help='file with a class name per line')
    args = vars(parser.parse_args())
    try:
        print(convert(**args))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'convert_umass: error: {e}')


if __name__ == '__main__':
    main()
