"""Bilinear CNNs

Two streams of features (or one, paired with itself), their outer product pooled over all locations, signed square
root, L2 norm, linear classifier.

Paper: `Bilinear CNNs for Fine-grained Visual Recognition` - https://arxiv.org/abs/1504.07889
"""

from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from .._compat import FeatureGetterNet, feature_take_indices
from ..layers import BilinearHead
from .pretrained import HUB_OWNER, check_hub_config, checkpoint_filter_fn, hub_errors
from .streams import concat_streams, create_stream, first_convs, input_config, is_nhwc, layer_ids, pair_levels

__all__ = ['BilinearCNN']


class BilinearCNN(nn.Module):
    """Bilinear CNN on timm backbones."""

    def __init__(
        self,
        backbone_a: str = 'resnet18',
        backbone_b: Optional[str] = None,
        out_index_a: int = -1,
        out_index_b: int = -1,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        pool_type: str = 'avg',
        global_pool: Optional[str] = None,
        eps: float = 1e-10,
        proj_dim: Optional[int] = None,
        drop_rate: float = 0.0,
        drop_path_rate: Optional[float] = None,
        freeze_backbone: bool = False,
        pretrained_streams: bool = False,
        all_levels: bool = False,
        cache_dir: Optional[Union[str, Path]] = None,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            backbone_a: timm model name of stream a, with or without tag.
            backbone_b: timm model name of stream b; None to pair stream a with itself.
            out_index_a: Feature level at which stream a ends, an index of timm's `feature_info`.
            out_index_b: Feature level at which stream b ends.
            num_classes: Number of classes, 0 for descriptors.
            in_chans: Number of input channels.
            img_size: Input size for backbones that are built for one size.
            pool_type: Pooling of the outer products: 'avg', 'sum', 'max', or '' for the feature map itself.
            global_pool: timm's name for `pool_type`, which it overrides.
            eps: Offset under the signed square root; 1e-10 is the article's, 1e-5 that of the authors' release.
            proj_dim: Project streams with more channels to this many by a 1x1 convolution.
            drop_rate: Dropout rate of the descriptor.
            drop_path_rate: Stochastic depth rate of the streams; None leaves the backbones' defaults.
            freeze_backbone: Streams get no gradients and stay in eval mode: the first of B-CNN's two training stages.
            pretrained_streams: Load the backbones' own timm weights into the streams.
            all_levels: Streams return all their feature levels (for `features_only`).
            cache_dir: Cache folder of the backbones' weights.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        kwargs = dict(
            all_levels=all_levels,
            pretrained=pretrained_streams,
            cache_dir=cache_dir,
            in_chans=in_chans,
            img_size=img_size,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        self.stream_a = create_stream('backbone_a', backbone_a, out_index_a, **kwargs)
        self.stream_b = create_stream('backbone_b', backbone_b, out_index_b, **kwargs) if backbone_b else None
        self.nhwc_a = is_nhwc(self.stream_a)
        self.nhwc_b = self.stream_b is not None and is_nhwc(self.stream_b)
        convs = [conv for name, stream in self.named_children() for conv in first_convs(name, stream)]
        self._traits = {'first_conv': tuple(convs)}

        channels_a = self.stream_a.feature_info.channels()[-1]
        channels_b = None if self.stream_b is None else self.stream_b.feature_info.channels()[-1]
        self.levels, self.feature_info = pair_levels(self.stream_a, self.stream_b)
        self.num_features = channels_a + (channels_b or 0)
        self.head = BilinearHead(
            channels_a,
            num_classes,
            in_features_b=channels_b,
            pool_type=pool_type if global_pool is None else global_pool,
            eps=eps,
            proj_dim=proj_dim,
            drop_rate=drop_rate,
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        self.freeze_backbone = False
        if freeze_backbone:
            self.set_freeze_backbone()

    def _streams(self) -> List[nn.Module]:
        return [s for s in (self.stream_a, self.stream_b) if s is not None]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze_backbone:
            for stream in self._streams():
                stream.eval()
        return self

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        ids = layer_ids('stream_a', self.stream_a, coarse)
        if self.stream_b is not None:
            ids.update(layer_ids('stream_b', self.stream_b, coarse))
        return lambda name: ids.get(name, float('inf'))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stream in self._streams():
            if not hasattr(stream, 'set_grad_checkpointing'):
                stream = stream.model  # FeatureGetterNet
            stream.set_grad_checkpointing(enable)
        self.head.grad_checkpointing = enable

    @torch.jit.ignore
    def set_freeze_backbone(self, enable: bool = True) -> None:
        self.freeze_backbone = enable
        for stream in self._streams():
            stream.requires_grad_(not enable)
        self.train(self.training)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: (B, in_chans, H, W) images.
            indices: Take last n levels if int, all if None, select matching indices if sequence.
            norm, stop_early: Unused, streams have no final norm and end at their last level.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features; two streams as in the features.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, _ = feature_take_indices(len(self.levels), indices)
        maps_a = self._maps(self.stream_a(x), self.nhwc_a)
        if self.stream_b is None:
            maps = maps_a
        else:
            maps_b = self._maps(self.stream_b(x), self.nhwc_b)
            maps = [concat_streams(maps_a[i], maps_b[j]) for i, j in self.levels]
        intermediates = [maps[i] for i in take_indices]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates: the head; streams are built to their last level."""
        take_indices, _ = feature_take_indices(len(self.levels), indices)
        if prune_head:
            self.reset_classifier(0, '')
            self.head.proj_a = nn.Identity()
            self.head.proj_b = None
        return take_indices

    def _maps(self, maps: List[torch.Tensor], nhwc: bool) -> List[torch.Tensor]:
        return [x.permute(0, 3, 1, 2) for x in maps] if nhwc else maps

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, in_chans, H, W) images.

        Returns:
            (B, num_features, h, w) features; two streams: channels of a then b, on the coarser grid.
        """
        a = self._maps(self.stream_a(x), self.nhwc_a)[-1]
        if self.stream_b is None:
            return a
        return concat_streams(a, self._maps(self.stream_b(x), self.nhwc_b)[-1])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _features(model: BilinearCNN, out_indices: Optional[Union[int, List[int]]] = None, **kwargs) -> FeatureGetterNet:
    return FeatureGetterNet(model, len(model.feature_info) if out_indices is None else out_indices, **kwargs)


def _create_bcnn(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Optional[Any] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    **kwargs,
) -> BilinearCNN:
    """Build a bilinear CNN.

    Without a tag or another source, `pretrained` means the backbones' own weights and a fresh classifier; otherwise
    complete weights.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if variant == 'bcnn' and not isinstance(pretrained_cfg, dict):
        overlay = dict(input_config(**kwargs), **overlay)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    is_own = cfg.hf_hub_id != default_cfgs[variant].default.hf_hub_id
    complete = any((is_own, cfg.source, cfg.tag, cfg.url, cfg.file, cfg.state_dict))
    out_indices = kwargs.pop('out_indices', None)
    features_only = kwargs.pop('features_only', False)
    streams = dict(pretrained_streams=pretrained and not complete, all_levels=features_only, cache_dir=cache_dir)
    check_hub_config(cfg, cache_dir)
    with hub_errors(cfg.hf_hub_id):
        return build_model_with_cfg(
            partial(BilinearCNN, **streams),
            variant,
            pretrained and complete,
            pretrained_cfg=cfg.to_dict(remove_null=False),
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(feature_cls=_features, out_indices=out_indices),
            cache_dir=cache_dir,
            features_only=features_only,
            **kwargs,
        )


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

# Untagged: the streams' own timm weights. `hf_hub_id` names those of stream a, `_create_bcnn` loads every stream's.
default_cfgs = generate_default_cfgs(
    {
        'bcnn_vgg16': _cfg('timm/vgg16.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_vgg16_bn': _cfg('timm/vgg16_bn.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_vgg19': _cfg('timm/vgg19.tv_in1k', 'stream_a.features_0', **_VGG),
        'bcnn_resnet18': _cfg('timm/resnet18.a1_in1k', 'stream_a.conv1'),
        # 378 fonts of 32 families: hub/fonts, docs/fonts.md
        'bcnn_resnet18.googlefonts': _cfg(
            f'{HUB_OWNER}/bcnn_resnet18.googlefonts', 'stream_a.conv1', num_classes=378, input_size=(3, 224, 224)
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
    """Bilinear CNN of ResNet-18 layer4 with itself; the tag googlefonts ends at layer3."""
    model_args = dict(backbone_a='resnet18', out_index_a=3 if kwargs.get('pretrained_cfg') == 'googlefonts' else 4)
    return _create_bcnn('bcnn_resnet18', pretrained=pretrained, **dict(model_args, **kwargs))


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
