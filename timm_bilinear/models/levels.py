"""Feature levels of streams: which belong together, how they are computed and cut off."""

import copy
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import BlurPool2d, Format
from timm.models import FeatureListNet

from .._compat import FeatureGetterNet

__all__ = [
    'TokenGetterNet',
    'add_class_token',
    'can_prune',
    'forward_levels',
    'is_nhwc',
    'layer_ids',
    'narrow_stream',
    'pair_levels',
    'prune_stream',
    'returned_levels',
    'set_last_stride',
]

_POOLS = (nn.AvgPool2d, nn.MaxPool2d, BlurPool2d)


class TokenGetterNet(FeatureGetterNet):
    """A transformer's feature maps, and after them its class token as a map (B, C, H, W) on the grid of the last."""

    def maps_and_token(self, x: torch.Tensor, levels: Sequence[int]) -> List[torch.Tensor]:
        """Maps of levels, and the class token of the last."""
        found = self.model.forward_intermediates(
            x,
            indices=list(levels),
            norm=self.norm,
            stop_early=True,
            output_fmt=self.output_fmt,
            intermediates_only=True,
            return_prefix_tokens=True,
        )
        last, prefix = found[-1]
        return [*(m for m, _ in found), prefix[:, 0, :, None, None].expand_as(last)]

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        return self.maps_and_token(x, self.out_indices)


def add_class_token(stream: nn.Module) -> Optional[TokenGetterNet]:
    """A stream that returns its class token too, None if it has none."""
    model = getattr(stream, 'model', None)
    if not isinstance(stream, FeatureGetterNet) or getattr(model, 'cls_token', None) is None:
        return None
    net = TokenGetterNet(model, list(stream.out_indices), output_fmt='NCHW', norm=stream.norm, prune=False)
    net.feature_info = stream.feature_info
    return net


def is_nhwc(stream: nn.Module) -> bool:
    """Whether a stream's maps are (B, H, W, C)."""
    return Format(getattr(stream, 'output_fmt', 'NCHW')) == Format.NHWC


def _pair_info(*infos: Dict[str, Any]) -> Dict[str, Any]:
    """`feature_info` of maps whose channels are concatenated on the coarsest grid."""
    num_chs = sum(info['num_chs'] for info in infos)
    return dict(num_chs=num_chs, reduction=max(info['reduction'] for info in infos), module='stream_a')


def pair_levels(
    stream_a: nn.Module, stream_b: Optional[nn.Module]
) -> Tuple[List[Tuple[int, int]], List[Dict[str, Any]]]:
    """Levels of two streams that belong together: those of equal reduction, and the last ones.

    Returns:
        Pairs of level indices, and `feature_info` of the pairs, in the order of reduction.
    """
    infos_a = {info['index']: info for info in stream_a.feature_info.get_dicts()}
    if stream_b is None:
        return [(i, i) for i in infos_a], [_pair_info(info) for info in infos_a.values()]
    infos_b = {info['index']: info for info in stream_b.feature_info.get_dicts()}
    at_a = {info['reduction']: i for i, info in infos_a.items()}
    at_b = {info['reduction']: i for i, info in infos_b.items()}
    last = (max(infos_a), max(infos_b))
    levels = [(at_a[r], at_b[r]) for r in sorted(set(at_a) & set(at_b))]
    levels = [level for level in levels if level != last] + [last]
    return levels, [_pair_info(infos_a[i], infos_b[j]) for i, j in levels]


def layer_ids(prefix: str, stream: nn.Module, coarse: bool) -> dict:
    """Depth of each parameter of a stream, by name: the place of its block (or stage, if `coarse`) in the stream."""
    ids, places = {}, {}
    for name, _ in stream.named_parameters():
        parts = [p for p in name.split('.') if p not in ('model', 'body')][:-1]
        depth = 1 if coarse or len(parts) < 2 or not parts[1].isdigit() else 2
        place = places.setdefault(tuple(parts[:depth]), len(places))
        ids[f'{prefix}.{name}'] = place
    return ids


def _level_layers(stream: FeatureListNet, levels: Sequence[int]) -> Dict[str, str]:
    """Layers whose outputs are levels of a stream, as `return_layers` has them; timm renames those of Sequentials."""
    names = {i: stream.feature_info[i]['module'] for i in levels}
    return {name if name in stream else name.replace('.', '_', 1): str(i) for i, name in names.items()}


def narrow_stream(stream: nn.Module, levels: Sequence[int]) -> None:
    """Let a stream return some levels alone, where its kind can, so that it holds no other maps until it ends.

    Args:
        stream: One that returns all its levels.
        levels: Indices of levels in ascending order, up to its last.
    """
    if isinstance(stream, FeatureGetterNet):
        stream.out_indices = tuple(levels)
    elif isinstance(stream, FeatureListNet):
        stream.return_layers = _level_layers(stream, levels)


def returned_levels(stream: nn.Module) -> List[int]:
    """Indices of the levels that a stream returns."""
    if isinstance(stream, FeatureGetterNet):
        return list(stream.out_indices)
    if isinstance(stream, FeatureListNet):
        return [int(i) for i in stream.return_layers.values()]
    return list(stream.feature_info.out_indices)


def set_last_stride(stream: nn.Module, level: int, stride: int) -> bool:
    """Set the stride of a stream's last stage, without dilation, in place of the 2 that its convolutions have.

    Args:
        stream: The stream.
        level: Index of its last level.
        stride: 1 for a grid twice as fine, 2 for none of this.

    Returns:
        Whether the stage has such convolutions, padded so that their grid is kept, and nothing else that is strided.
    """
    if not isinstance(stream, FeatureListNet):
        return False
    (name,) = _level_layers(stream, (level,))
    strided = [m for m in stream[name].modules() if getattr(m, 'stride', 1) in (2, (2, 2))]
    convs = [m for m in strided if isinstance(m, nn.Conv2d)]
    keep_grid = all(2 * p == k - 1 for m in convs for k, p in zip(m.kernel_size, m.padding))
    if not convs or not keep_grid or any(isinstance(m, _POOLS) for m in strided):
        return False
    if stride == 1:
        for m in strided:
            m.stride = (1, 1) if isinstance(m, nn.Conv2d) else 1
        stream.feature_info.info[level]['reduction'] //= 2
    return True


def can_prune(stream: nn.Module) -> bool:
    """Whether layers can be removed from the end of a stream."""
    if isinstance(stream, FeatureGetterNet):
        return hasattr(stream.model, 'prune_intermediate_layers')
    return isinstance(stream, FeatureListNet)


def prune_stream(stream: nn.Module, level: int) -> None:
    """Remove a stream's layers behind a level.

    Args:
        stream: Stream for which `can_prune` holds.
        level: Index of its new last level.
    """
    if isinstance(stream, FeatureGetterNet):
        stream.model.prune_intermediate_layers([level], prune_norm=not stream.norm)
        stream.out_indices = tuple(i for i in stream.out_indices if i <= level) or (level,)
    else:
        (end,) = _level_layers(stream, (level,))
        names = list(stream)
        for name in names[names.index(end) + 1 :]:
            del stream[name]
        kept = [int(i) for i in stream.return_layers.values() if int(i) <= level]
        stream.return_layers = _level_layers(stream, kept or (level,))
    stream.feature_info = stream.feature_info.from_other([i for i in stream.feature_info.out_indices if i <= level])


def forward_levels(stream: nn.Module, x: torch.Tensor, levels: Sequence[int]) -> Dict[int, torch.Tensor]:
    """Maps of some levels of a stream, which runs no further than the last of them where its kind can.

    Args:
        stream: Stream, whichever levels it returns itself.
        x: (B, in_chans, H, W) images.
        levels: Indices of levels.

    Returns:
        (B, C, h, w) maps by index; under -1 the class token of the last, of a stream that has it.
    """
    levels = sorted(set(levels))
    if isinstance(stream, TokenGetterNet):
        return dict(zip([*levels, -1], stream.maps_and_token(x, levels)))
    if isinstance(stream, FeatureGetterNet):
        maps = stream.model.forward_intermediates(
            x, indices=levels, norm=stream.norm, stop_early=True, output_fmt=stream.output_fmt, intermediates_only=True
        )
        found = dict(zip(levels, maps))
    elif isinstance(stream, FeatureListNet):
        layers = _level_layers(stream, levels)
        returned = returned_levels(stream)
        if max(levels) < returned[-1] or not set(levels) <= set(returned):
            # The same layers in another list: the stream itself may be in use elsewhere.
            names = list(stream)
            end = max(map(names.index, layers))
            stream = copy.copy(stream)
            stream._modules = {name: stream[name] for name in names[: end + 1]}
            stream.return_layers, returned = layers, levels
        found = dict(zip(returned, stream(x)))
    else:
        found = dict(zip(stream.feature_info.out_indices, stream(x)))
    return {i: found[i].permute(0, 3, 1, 2) if is_nhwc(stream) else found[i] for i in levels}
