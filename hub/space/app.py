"""The page of timm-bilinear/bcnn_resnet18_c4.googlefonts378, which is loaded from the Hub when the Space starts."""

from timm_bilinear.tools.app import run_app

run_app('hf-hub:timm-bilinear/bcnn_resnet18_c4.googlefonts378', host='0.0.0.0', port=7860)
