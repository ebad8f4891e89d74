"""Bilinear CNNs

Two streams of features (or one, paired with itself), their outer product pooled over all locations, signed square
root, L2 norm, linear classifier; and the networks of later papers that pool it otherwise.

Papers:
`Bilinear CNNs for Fine-grained Visual Recognition` - https://arxiv.org/abs/1504.07889
`Compact Bilinear Pooling` - https://arxiv.org/abs/1511.06062
`Improved Bilinear Pooling with CNNs` - https://arxiv.org/abs/1707.06772
`Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization`
- https://arxiv.org/abs/1712.01034
`Hierarchical Bilinear Pooling for Fine-Grained Visual Recognition` - https://arxiv.org/abs/1807.09915
`Low-rank Bilinear Pooling for Fine-Grained Classification` - https://arxiv.org/abs/1611.05109
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)

from .._compat import FeatureGetterNet
from ..layers.arguments import argument_problem, arguments_of
from ..layers.pooling import pooling_arguments
from .bilinear_cnn import BilinearCNN
from .hub_config import check_hub_config
from .pretrained import HUB_OWNER, checkpoint_filter_fn, fetch_weights
from .streams import input_config

__all__ = ['BilinearCNN']

_logger = logging.getLogger(__name__)


def _features(model: BilinearCNN, out_indices: Optional[Union[int, List[int]]] = None, **kwargs) -> FeatureGetterNet:
    return FeatureGetterNet(model, len(model.feature_info) if out_indices is None else out_indices, **kwargs)


def _resolve_cfg(
    variant: str,
    pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]],
    overlay: Optional[Dict[str, Any]],
    **kwargs,
) -> PretrainedCfg:
    """Config of a model, by tag, as an object, a dict of one, or none.

    Raises:
        RuntimeError: If it belongs to another architecture, or there is no such tag.
    """
    overlay = dict(overlay or {})
    if isinstance(pretrained_cfg, str) and pretrained_cfg not in default_cfgs[variant].cfgs:
        arch = next((arch for arch, cfg in default_cfgs.items() if pretrained_cfg in cfg.cfgs), None)
        if arch is not None:
            raise RuntimeError(f"The tag '{pretrained_cfg}' is not one of {variant}: use '{arch}.{pretrained_cfg}'.")
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = PretrainedCfg(**pretrained_cfg)
    # timm's train script hands the registered config over, which for any backbones says nothing of them
    if variant == 'bcnn' and (not pretrained_cfg or pretrained_cfg == get_pretrained_cfg(variant)):
        overlay = dict(input_config(**kwargs), **overlay)
    if kwargs.get('backbone_args') or kwargs.get('backbone_args_b'):
        overlay.setdefault('pool_size', None)  # a stride may be among them
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.architecture != variant and cfg.architecture in default_cfgs:
        raise RuntimeError(f"The config is one of {cfg.architecture}, not of {variant}: use '{cfg.architecture}'.")
    return replace(cfg, architecture=variant)


def _replace_saved_pooling(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of a saved model and a user's together, of which the user's `pool_type` counts.

    timm saves the pooling that a model has as `global_pool`, which overrides `pool_type`.

    Raises:
        ValueError: If there is no such pooling.
    """
    saved = kwargs.get('pretrained_model_args') or {}
    if 'global_pool' not in saved:
        return kwargs
    kwargs = dict(dict(global_pool=saved['global_pool']), **kwargs)
    if kwargs['global_pool'] == saved['global_pool'] and kwargs.get('pool_type') not in (None, saved.get('pool_type')):
        kwargs['global_pool'] = kwargs['pool_type']
    pooling = kwargs['global_pool']
    if pooling and pooling != saved['global_pool']:
        known, of_model = pooling_arguments(pooling), arguments_of(BilinearCNN)
        for name in set(saved) - set(of_model):
            is_taken = name in known and not argument_problem(known[name], saved[name])
            if not is_taken and kwargs.get(name) == saved[name]:
                del kwargs[name]
        _logger.warning(
            f"The model was saved with the pooling '{saved['global_pool']}' and is made with '{pooling}':"
            ' its classifier, and what the pooling has of its own, were trained for the former.'
        )
    return kwargs


def _create_bcnn(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Optional[Any] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    default_pool: str = 'avg',
    **kwargs,
) -> BilinearCNN:
    """Build a bilinear CNN, which has the pooling `default_pool` if no other is asked for.

    Without a tag or another source, `pretrained` means the backbones' own weights and a fresh classifier; otherwise
    complete weights.
    """
    kwargs = dict(dict(pool_type=default_pool), **_replace_saved_pooling(kwargs))
    cfg = _resolve_cfg(variant, pretrained_cfg, pretrained_cfg_overlay, **kwargs)
    is_own = cfg.hf_hub_id not in (None, default_cfgs[variant].default.hf_hub_id)
    complete = any((is_own, cfg.source, cfg.tag, cfg.url, cfg.file, cfg.state_dict))
    out_indices = kwargs.pop('out_indices', None)
    features_only = kwargs.pop('features_only', False)
    if features_only:
        kwargs['num_classes'] = 0  # a classifier would be built to be thrown away
    streams = dict(pretrained_streams=pretrained and not complete, all_levels=features_only, cache_dir=cache_dir)
    check_hub_config(cfg, cache_dir)
    fetched = fetch_weights(cfg, cache_dir) if pretrained and complete else {}
    model = build_model_with_cfg(
        partial(BilinearCNN, **streams),
        variant,
        pretrained and complete,
        pretrained_cfg=dict(cfg.to_dict(remove_null=False), **fetched),
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls=_features, out_indices=out_indices),
        cache_dir=cache_dir,
        features_only=features_only,
        **kwargs,
    )
    model.pretrained_cfg['hf_hub_id'] = cfg.hf_hub_id  # as asked for, not the commit that was taken
    return model


def _cfg(hf_hub_id: Optional[str], first_conv: Union[str, Tuple[str, ...]], **kwargs) -> Dict[str, Any]:
    return {
        'hf_hub_id': hf_hub_id,
        'first_conv': first_conv,
        'num_classes': 1000,
        'input_size': (3, 448, 448),
        'pool_size': (14, 14),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'classifier': 'head.fc',
        'paper_name': 'Bilinear CNNs for Fine-grained Visual Recognition',
        'paper_ids': 'arXiv:1504.07889',
        **kwargs,
    }


_VGG = dict(pool_size=(28, 28), interpolation='bilinear')
_CBP = dict(paper_name='Compact Bilinear Pooling', paper_ids='arXiv:1511.06062')
_IMPROVED = dict(paper_name='Improved Bilinear Pooling with CNNs', paper_ids='arXiv:1707.06772')
_ISQRT = dict(
    paper_name='Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root'
    ' Normalization',
    paper_ids='arXiv:1712.01034',
    pool_size=(28, 28),
)
_HBP = dict(
    paper_name='Hierarchical Bilinear Pooling for Fine-Grained Visual Recognition', paper_ids='arXiv:1807.09915'
)
_LRBP = dict(paper_name='Low-rank Bilinear Pooling for Fine-Grained Classification', paper_ids='arXiv:1611.05109')

# Untagged: the streams' own timm weights. `hf_hub_id` names those of stream a, `_create_bcnn` loads every stream's.
default_cfgs = generate_default_cfgs(
    {
        'bcnn_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_vgg16_bn': _cfg('timm/vgg16_bn.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_vgg19': _cfg('timm/vgg19.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_resnet18': _cfg('timm/resnet18.a1_in1k', 'stream_a.conv1'),
        'bcnn_resnet18_c4': _cfg('timm/resnet18.a1_in1k', 'stream_a.conv1', pool_size=(28, 28)),
        # 378 fonts of 32 families: hub/fonts, docs/fonts.md
        'bcnn_resnet18_c4.googlefonts378': _cfg(
            f'{HUB_OWNER}/bcnn_resnet18_c4.googlefonts378',
            'stream_a.conv1',
            num_classes=378,
            input_size=(3, 224, 224),
            pool_size=(14, 14),
            crop_mode='border',
        ),
        'bcnn_resnet34': _cfg('timm/resnet34.a1_in1k', 'stream_a.conv1'),
        'bcnn_resnet50': _cfg('timm/resnet50.a1_in1k', 'stream_a.conv1'),
        'bcnn_densenet201': _cfg('timm/densenet201.tv_in1k', 'stream_a.features_conv0'),
        'bcnn_convnext_tiny': _cfg('timm/convnext_tiny.in12k_ft_in1k', 'stream_a.stem_0'),
        'bcnn_vgg16_resnet18': _cfg(
            'timm/vgg16.tv_in1k', ('stream_a.features_0', 'stream_b.conv1'), interpolation='bilinear'
        ),
        'bcnn_vgg16_vgg19': _cfg('timm/vgg16.tv_in1k', ('stream_a.features_0', 'stream_b.features_0'), **_VGG),
        'bcnn_resnet18_resnet34': _cfg('timm/resnet18.a1_in1k', ('stream_a.conv1', 'stream_b.conv1')),
        'bcnn_resnet34_resnet50': _cfg('timm/resnet34.a1_in1k', ('stream_a.conv1', 'stream_b.conv1')),
        'bcnn': _cfg(None, 'stream_a.conv1'),
        'cbcnn_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG, **_CBP),
        'cbcnn_resnet50': _cfg('timm/resnet50.a1_in1k', 'stream_a.conv1', **_CBP),
        'ibcnn_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG, **_IMPROVED),
        'ibcnn_densenet201': _cfg('timm/densenet201.tv_in1k', 'stream_a.features_conv0', **_IMPROVED),
        'mpncov_resnet50': _cfg('timm/resnet50.a1_in1k', 'stream_a.conv1', **_ISQRT),
        'mpncov_resnet101': _cfg('timm/resnet101.a1h_in1k', 'stream_a.conv1', **_ISQRT),
        'mpncov_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **dict(_VGG, **_ISQRT)),
        'mpncov_vgg16_bn': _cfg('timm/vgg16_bn.tv_in1k', 'stream_a.features_0', **dict(_VGG, **_ISQRT)),
        'hbp_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG, **_HBP),
        'hbp_resnet34': _cfg('timm/resnet34.a1_in1k', 'stream_a.conv1', **_HBP),
        'lrbp_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG, **_LRBP),
    }
)


@register_model
def bcnn_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of VGG-16 relu5_3 with itself."""
    model_args = dict(backbone_a='vgg16', out_index_a=4)
    return _create_bcnn('bcnn_vgg16', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_vgg16_bn(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of VGG-16 w/ batch norm relu5_3 with itself."""
    model_args = dict(backbone_a='vgg16_bn', out_index_a=4)
    return _create_bcnn('bcnn_vgg16_bn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_vgg19(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of VGG-19 relu5_4 with itself."""
    model_args = dict(backbone_a='vgg19', out_index_a=4)
    return _create_bcnn('bcnn_vgg19', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet18(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of ResNet-18 layer4 with itself."""
    model_args = dict(backbone_a='resnet18', out_index_a=4)
    return _create_bcnn('bcnn_resnet18', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet18_c4(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of ResNet-18 layer3, which ends stage C4, with itself."""
    model_args = dict(backbone_a='resnet18', out_index_a=3)
    return _create_bcnn('bcnn_resnet18_c4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet34(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of ResNet-34 layer4 with itself."""
    model_args = dict(backbone_a='resnet34', out_index_a=4)
    return _create_bcnn('bcnn_resnet34', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet50(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-50 layer4 with itself, 2048 channels projected to 512: 26.3 M classifier parameters for 200 classes."""
    model_args = dict(backbone_a='resnet50', out_index_a=4, proj_dim=512)
    return _create_bcnn('bcnn_resnet50', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_densenet201(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """DenseNet-201 norm5 with itself, 1920 channels projected to 512: 26.3 M classifier parameters for 200 classes."""
    model_args = dict(backbone_a='densenet201', out_index_a=4, proj_dim=512)
    return _create_bcnn('bcnn_densenet201', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_convnext_tiny(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ConvNeXt-Tiny stage 4 with itself, 768 channels projected to 512: 26.3 M classifier weights for 200 classes."""
    model_args = dict(backbone_a='convnext_tiny', out_index_a=3, proj_dim=512)
    return _create_bcnn('bcnn_convnext_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_vgg16_resnet18(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of VGG-16 relu5_3 and ResNet-18 layer4."""
    model_args = dict(backbone_a='vgg16', backbone_b='resnet18', out_index_a=4, out_index_b=4)
    return _create_bcnn('bcnn_vgg16_resnet18', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_vgg16_vgg19(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of VGG-16 relu5_3 and VGG-19 relu5_4."""
    model_args = dict(backbone_a='vgg16', backbone_b='vgg19', out_index_a=4, out_index_b=4)
    return _create_bcnn('bcnn_vgg16_vgg19', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet18_resnet34(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of ResNet-18 layer4 and ResNet-34 layer4."""
    model_args = dict(backbone_a='resnet18', backbone_b='resnet34', out_index_a=4, out_index_b=4)
    return _create_bcnn('bcnn_resnet18_resnet34', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn_resnet34_resnet50(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-34 and ResNet-50 layer4, the latter projected to 512 channels: 52.4 M classifier parameters for 200."""
    model_args = dict(backbone_a='resnet34', backbone_b='resnet50', out_index_a=4, out_index_b=4, proj_dim=512)
    return _create_bcnn('bcnn_resnet34_resnet50', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def bcnn(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """Bilinear CNN of any timm backbones: `backbone_a`, `backbone_b` (None: `backbone_a` with itself)."""
    model_args = dict(backbone_a='resnet18')
    return _create_bcnn('bcnn', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cbcnn_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 relu5_3 with itself by Tensor Sketch."""
    model_args = dict(backbone_a='vgg16', out_index_a=4)
    return _create_bcnn('cbcnn_vgg16', pretrained=pretrained, default_pool='sketch', **dict(model_args, **kwargs))


@register_model
def cbcnn_resnet50(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-50 layer4, all its 2048 channels, with itself by Tensor Sketch."""
    model_args = dict(backbone_a='resnet50', out_index_a=4)
    return _create_bcnn('cbcnn_resnet50', pretrained=pretrained, default_pool='sketch', **dict(model_args, **kwargs))


@register_model
def ibcnn_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 relu5_3 with itself, matrix square root before the signed one."""
    model_args = dict(backbone_a='vgg16', out_index_a=4)
    return _create_bcnn('ibcnn_vgg16', pretrained=pretrained, default_pool='sqrtm', **dict(model_args, **kwargs))


@register_model
def ibcnn_densenet201(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """DenseNet-201 norm5 projected to 512 channels with itself, matrix square root before the signed one."""
    model_args = dict(backbone_a='densenet201', out_index_a=4, proj_dim=512)
    return _create_bcnn('ibcnn_densenet201', pretrained=pretrained, default_pool='sqrtm', **dict(model_args, **kwargs))


_MPNCOV_ARGS = dict(out_index_a=4, proj_dim=256, proj_type='conv_bn_relu')


@register_model
def mpncov_resnet50(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-50 layer4 at stride 16, projected to 256 channels, root of their covariance."""
    model_args = dict(_MPNCOV_ARGS, backbone_a='resnet50', last_stride=1)
    return _create_bcnn('mpncov_resnet50', pretrained=pretrained, default_pool='isqrt', **dict(model_args, **kwargs))


@register_model
def mpncov_resnet101(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-101 layer4 at stride 16, projected to 256 channels, root of their covariance."""
    model_args = dict(_MPNCOV_ARGS, backbone_a='resnet101', last_stride=1)
    return _create_bcnn('mpncov_resnet101', pretrained=pretrained, default_pool='isqrt', **dict(model_args, **kwargs))


@register_model
def mpncov_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 relu5_3 projected to 256 channels, root of their covariance."""
    model_args = dict(_MPNCOV_ARGS, backbone_a='vgg16')
    return _create_bcnn('mpncov_vgg16', pretrained=pretrained, default_pool='isqrt', **dict(model_args, **kwargs))


@register_model
def mpncov_vgg16_bn(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 w/ batch norm relu5_3 projected to 256 channels, root of their covariance: VGG-D of fast-MPN-COV."""
    model_args = dict(_MPNCOV_ARGS, backbone_a='vgg16_bn')
    return _create_bcnn('mpncov_vgg16_bn', pretrained=pretrained, default_pool='isqrt', **dict(model_args, **kwargs))


@register_model
def hbp_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 relu3_3, relu4_3 and relu5_3, each pair of them; the paper has relu5_1 to relu5_3."""
    model_args = dict(backbone_a='vgg16', out_indices_a=(2, 3, 4))
    return _create_bcnn('hbp_vgg16', pretrained=pretrained, default_pool='cross', **dict(model_args, **kwargs))


@register_model
def hbp_resnet34(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """ResNet-34 layer2, layer3 and layer4, each pair of them."""
    model_args = dict(backbone_a='resnet34', out_indices_a=(2, 3, 4))
    return _create_bcnn('hbp_resnet34', pretrained=pretrained, default_pool='cross', **dict(model_args, **kwargs))


@register_model
def lrbp_vgg16(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """VGG-16 relu5_3 projected to 100 channels, classifier of rank 8."""
    model_args = dict(backbone_a='vgg16', out_index_a=4, proj_dim=100)
    return _create_bcnn('lrbp_vgg16', pretrained=pretrained, default_pool='lowrank', **dict(model_args, **kwargs))
