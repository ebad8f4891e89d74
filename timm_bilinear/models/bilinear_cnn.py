"""The bilinear CNN: one or two streams of features and the head that pairs them."""

import logging
from pathlib import Path
from typing import Annotated, Any, Callable, Dict, List, Literal, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import get_device_dtype

from .._compat import feature_take_indices
from ..layers import BilinearHead
from ..layers.arguments import Bounds, Internal, Runtime, arguments_of, check_argument, check_arguments
from ..layers.pooling import check_pooling, list_poolings, pooling_arguments
from .empty import is_empty, one_image
from .levels import can_prune, forward_levels, is_nhwc, layer_ids, pair_levels, prune_stream, returned_levels
from .streams import concat_levels, concat_streams, create_streams, first_convs, match_grid

__all__ = ['BilinearCNN']

_logger = logging.getLogger(__name__)

_HUGE = 10**9  # parameters of a classifier, 4 GB in float32


class BilinearCNN(nn.Module):
    """Bilinear CNN on timm backbones."""

    def __init__(
        self,
        backbone_a: str = 'resnet18',
        backbone_b: Optional[str] = None,
        out_index_a: Annotated[int, Bounds(-100, 100)] = -1,
        out_index_b: Annotated[int, Bounds(-100, 100)] = -1,
        num_classes: Annotated[int, Bounds(0, 10_000_000)] = 1000,
        in_chans: Annotated[int, Bounds(1, 1024)] = 3,
        img_size: Annotated[Optional[Union[int, Tuple[int, int]]], Bounds(1, 16384)] = None,
        pool_type: str = 'avg',
        global_pool: Optional[str] = None,
        proj_dim: Annotated[Optional[int], Bounds(1, 65536)] = None,
        drop_rate: Annotated[float, Bounds(0, 1)] = 0.0,
        drop_path_rate: Annotated[Optional[float], Bounds(0, 1)] = None,
        drop_block_rate: Annotated[Optional[float], Bounds(0, 1)] = None,
        bn_momentum: Annotated[Optional[float], Bounds(0, 1)] = None,
        bn_eps: Annotated[Optional[float], Bounds(above=0, most=1)] = None,
        backbone_args: Annotated[Optional[Dict[str, Any]], Bounds(-65536, 65536)] = None,
        backbone_args_b: Annotated[Optional[Dict[str, Any]], Bounds(-65536, 65536)] = None,
        out_indices_a: Annotated[Optional[Tuple[int, ...]], Bounds(-100, 100)] = None,
        last_stride: Annotated[Optional[int], Bounds(1, 2)] = None,
        class_token: bool = False,
        proj_type: Literal['conv', 'conv_bn_relu'] = 'conv',
        freeze_backbone: Annotated[bool, Runtime] = False,
        pretrained_streams: Annotated[bool, Internal] = False,
        all_levels: Annotated[bool, Internal] = False,
        cache_dir: Annotated[Optional[Union[str, Path]], Internal] = None,
        device: Annotated[Any, Internal] = None,
        dtype: Annotated[Any, Internal] = None,
        **pool_args,
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
            pool_type: Pooling, one of `timm_bilinear.layers.list_poolings()`, or '' for the feature map itself.
            global_pool: timm's name for `pool_type`, which it overrides.
            proj_dim: Project streams with more channels to this many by a 1x1 convolution.
            drop_rate: Dropout rate of the descriptor.
            drop_path_rate: Stochastic depth rate of the streams that have it; None leaves the backbones' defaults.
            drop_block_rate: DropBlock rate of the streams that have it; None leaves the backbones' defaults.
            bn_momentum: Momentum of the streams' batch norms; None leaves the backbones' own.
            bn_eps: Epsilon of the streams' batch norms; None leaves the backbones' own.
            backbone_args: Arguments for the backbones, e.g. `dict(output_stride=16)` for a denser grid.
            backbone_args_b: Arguments for the backbone of stream b; None for those of `backbone_args`.
            out_indices_a: Levels of stream a that are pooled together, in place of `out_index_a`; for a model of one
                stream and a pooling of several levels ('cross'). A finer map is average-pooled to the coarsest grid.
            last_stride: Stride of the convolutions of the streams' last stage, 1 for a grid twice as fine without
                dilation, as MPN-COV and person re-identification have it; None leaves the backbones' own.
            class_token: Take a transformer's class token as a second map, the same at every location, for a model of
                one stream and a pooling of tokens ('moments').
            proj_type: What follows the projection: 'conv' for nothing, 'conv_bn_relu' for batch norm and ReLU.
            freeze_backbone: Streams get no gradients and stay in eval mode: the first of B-CNN's two training stages.
            pretrained_streams: Load the backbones' own timm weights into the streams.
            all_levels: Streams return all their feature levels (for `features_only`).
            cache_dir: Cache folder of the backbones' weights.
            **pool_args: Arguments of the pooling, e.g. `eps`.

        Raises:
            TypeError: If an argument is unknown or of the wrong type.
            ValueError: If an argument is out of its range, or a backbone cannot be a stream.
            RuntimeError: If pretrained weights cannot be had.
        """
        super().__init__()
        checked = check_arguments(BilinearCNN, {k: v for k, v in locals().items() if k != 'pool_args'})
        num_classes, in_chans, img_size = (checked[k] for k in ('num_classes', 'in_chans', 'img_size'))
        levels_a = checked['out_indices_a'] or (out_index_a,)
        for name, given in (('out_indices_a', len(levels_a) > 1), ('class_token', class_token)):
            if given and backbone_b is not None:
                raise ValueError(f"'{name}' is for a model of one stream, not with 'backbone_b'.")
        if class_token and len(levels_a) > 1:
            raise ValueError("'class_token' is of one level, not of several 'out_indices_a'.")
        pool_type = pool_type if global_pool is None else global_pool
        # before streams are built, or their weights fetched
        pool_args = check_pooling(pool_type, pool_args, beside=BilinearCNN)
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        self.stream_a, self.stream_b = create_streams(
            (backbone_a, backbone_b),
            (levels_a, (out_index_b,)),
            (backbone_args, backbone_args if backbone_args_b is None else backbone_args_b),
            drop_args=dict(drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate),
            bn_args=dict(bn_momentum=bn_momentum, bn_eps=bn_eps),
            all_levels=all_levels,
            last_stride=last_stride,
            class_token=class_token,
            pretrained=pretrained_streams,
            cache_dir=cache_dir,
            in_chans=in_chans,
            img_size=img_size,
            **dd,
        )
        self.nhwc_a = is_nhwc(self.stream_a)
        self.nhwc_b = self.stream_b is not None and is_nhwc(self.stream_b)
        convs = [conv for name, stream in self.named_children() for conv in first_convs(name, stream)]
        self._traits = {'first_conv': tuple(convs)}

        self.levels, self.feature_info = pair_levels(self.stream_a, self.stream_b)
        count = len(self.levels) if self.stream_b is None else 0
        # levels of stream a whose maps are concatenated, none for its last alone
        self.pooled_levels = sorted(i % count for i in levels_a) if len(levels_a) > 1 else []
        returned = returned_levels(self.stream_a)
        self.pooled_maps = [returned.index(i) for i in self.pooled_levels] or [-1]  # places in what the stream returns
        self.class_token = class_token
        if class_token:
            self.pooled_maps = [-2, -1]
        channels_a = self.stream_a.feature_info.channels()[-1]
        channels_b = None if self.stream_b is None else self.stream_b.feature_info.channels()[-1]
        if class_token:
            channels_b = channels_a
        level_channels = tuple(self.feature_info[i]['num_chs'] for i in self.pooled_levels)
        self.num_features = sum(level_channels) or channels_a + (channels_b or 0)
        self.head = BilinearHead(
            level_channels or channels_a,
            num_classes=0,
            in_features_b=channels_b,
            pool_type=pool_type,
            proj_dim=proj_dim,
            proj_type=proj_type,
            drop_rate=drop_rate,
            **dd,
            **pool_args,
        )
        self.head_hidden_size = self.head.num_features
        self.reset_classifier(num_classes)  # once it is known how many parameters that takes
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
        """Freeze the streams, or make trainable again what was trainable before they were frozen.

        Args:
            enable: Streams get no gradients and stay in eval mode.
        """
        if enable:
            if not self.freeze_backbone:
                self._before_freezing = self._trained_parts()
            for stream in self._streams():
                stream.requires_grad_(False).eval()
        elif self.freeze_backbone:
            requires_grad, in_eval = self._before_freezing
            for name, param in self.named_parameters():
                param.requires_grad_(requires_grad.get(name, param.requires_grad))
            for stream in self._streams():
                stream.train(self.training)
            for name, module in self.named_modules():
                if name in in_eval:
                    module.training = False
        self.freeze_backbone = enable

    def _trained_parts(self) -> Tuple[Dict[str, bool], List[str]]:
        """What of the streams is trained: by parameter whether it has gradients, and modules that stay in eval mode."""
        requires_grad = {k: p.requires_grad for k, p in self.named_parameters() if k.startswith('stream_')}
        # In a model in eval mode nothing tells which modules are meant to stay there.
        in_eval = [k for k, m in self.named_modules() if k.startswith('stream_') and self.training and not m.training]
        return requires_grad, in_eval

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """
        Args:
            num_classes: Number of classes of the new classifier, 0 for descriptors.
            global_pool: New pooling, unchanged if None.
        """
        dd = get_device_dtype(self)
        num_classes = check_argument('num_classes', arguments_of(BilinearCNN)['num_classes'], num_classes)
        self.head.reset(min(num_classes, 0), global_pool, **dd)
        num_params = num_classes * (self.head.num_features + 1)
        if num_params > _HUGE:
            _logger.warning(
                f'A classifier of {num_classes:,} classes on descriptors of {self.head.num_features:,} entries has'
                f" {num_params / 1e9:.1f} billion parameters; 'proj_dim' makes descriptors smaller."
            )
        self.head.reset(num_classes, **dd)
        self.num_classes = num_classes
        self._model_args = self._model_args  # without those of a pooling that is gone
        self.head_hidden_size = self.head.num_features

    @torch.jit.unused
    @property
    def _model_args(self) -> Dict[str, Any]:
        """Arguments that timm keeps, and saves with the pooling's name as `global_pool`."""
        return self.__dict__.get('_saved_args', {})

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        # Of a pooling that was replaced, neither its name nor arguments that the present one does not take.
        of_poolings = {name for pooling in list_poolings() for name in pooling_arguments(pooling)}
        replaced = (of_poolings | {'pool_type'}) - set(self.head.pool_args)
        self._saved_args = {k: v for k, v in args.items() if k not in replaced}

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
            norm: Unused, streams have no final norm.
            stop_early: Run no further than the last level taken; the features are that level's.
            output_fmt: Shape of the intermediates, 'NCHW' or 'NHWC'.
            intermediates_only: Only return intermediate features.

        Returns:
            (B, C, h, w) features and list of intermediate features or just intermediate features; two streams as in
            `forward_features`.
        """
        assert output_fmt in ('NCHW', 'NHWC'), 'Output shape must be NCHW or NHWC.'
        if is_empty(x):
            with one_image(self, x) as image:
                features, intermediates = self.forward_intermediates(image, indices, norm, stop_early, output_fmt)
            intermediates = [m[:0] for m in intermediates]
            return intermediates if intermediates_only else (features[:0], intermediates)
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last = max_index if stop_early else len(self.levels) - 1
        pooled = self.pooled_levels if last == len(self.levels) - 1 else []
        needed = [self.levels[i] for i in {*take_indices, *pooled, last}]
        if len(self.pooled_maps) == 2 and self.class_token and last == len(self.levels) - 1:
            pooled = [self.levels[last][0], -1]
        maps_a = forward_levels(self.stream_a, x, [i for i, _ in needed])
        maps_b = {} if self.stream_b is None else forward_levels(self.stream_b, x, [j for _, j in needed])

        def level(index: int) -> torch.Tensor:
            i, j = self.levels[index]
            return maps_a[i] if self.stream_b is None else concat_streams(maps_a[i], maps_b[j])

        intermediates = [level(i) for i in take_indices]
        if output_fmt == 'NHWC':
            intermediates = [m.permute(0, 2, 3, 1) for m in intermediates]
        if intermediates_only:
            return intermediates
        return concat_levels([maps_a[i] for i in pooled]) if pooled else level(last), intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Levels to keep, as for `forward_intermediates`.
            prune_norm: Unused, streams have no final norm.
            prune_head: Remove pooling, projections and classifier.

        Returns:
            Indices of the levels.
        """
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        if max_index < len(self.levels) - 1 and all(map(can_prune, self._streams())):
            for stream, level in zip(self._streams(), self.levels[max_index]):
                prune_stream(stream, level)
            self.levels = self.levels[: max_index + 1]
            self.feature_info = self.feature_info[: max_index + 1]
            self.num_features = self.feature_info[-1]['num_chs']
            self.pooled_levels, self.pooled_maps = [], [-2 if self.class_token else -1]
        if prune_head:
            self.reset_classifier(0, '')
            self.head.proj_a = nn.Identity()
            self.head.proj_b = None
        return take_indices

    def _map(self, maps: List[torch.Tensor], nhwc: bool) -> torch.Tensor:
        return maps[-1].permute(0, 3, 1, 2) if nhwc else maps[-1]

    def _map_a(self, maps: List[torch.Tensor]) -> torch.Tensor:
        pooled = [self._map([maps[i]], self.nhwc_a) for i in self.pooled_maps]
        return pooled[0] if len(pooled) == 1 else concat_levels(pooled)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, in_chans, H, W) images.

        Returns:
            (B, num_features, h, w) features; two streams: channels of a then b, several levels: of each in turn, on the
            coarsest grid.
        """
        if not torch.jit.is_scripting():
            if is_empty(x):
                with one_image(self, x) as image:
                    return self.forward_features(image)[:0]
        a = self._map_a(self.stream_a(x))
        if self.stream_b is None:
            return a
        return concat_streams(a, self._map(self.stream_b(x), self.nhwc_b))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stream_b is None:
            return self.forward_head(self.forward_features(x))
        if not torch.jit.is_scripting():
            if is_empty(x):
                return self.forward_head(self.forward_features(x))
        # The head takes two maps as they are, so that none is copied into one and sliced out of it again.
        a = self._map(self.stream_a(x), self.nhwc_a)
        b = self._map(self.stream_b(x), self.nhwc_b)
        return self.head(match_grid(a, b), x_b=match_grid(b, a))
