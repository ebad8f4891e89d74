"""Which pairs of channels speak for a class over many images, and what each of them sees."""

import heapq
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

from PIL import Image
from torch import nn

from .evidence import explain_pairs
from .evidence_pictures import draw_evidence
from .pictures import GREY, INK, Tile, draw_sheet
from .prediction import Source
from .shown_images import ImageReader, read_views

__all__ = ['draw_channel_pairs']

_EXAMPLES = 4  # images of each pair


def draw_channel_pairs(
    net: nn.Module,
    sources: Sequence[Source],
    read: ImageReader,
    target: int,
    contrast: Union[int, str, None],
    count: int,
) -> Tuple[List[Dict[str, Any]], Image.Image]:
    """Find the pairs of channels that give most to a class on average, and the images that each gives most in.

    Args:
        net: A bilinear CNN with exact average or sum pooling, in eval mode.
        sources: Images, of which some can be read.
        read: Reads them.
        target: Class.
        contrast: Class that it is compared with, 'rest' or None.
        count: Number of pairs.

    Returns:
        For each pair its 'channels', the 'evidence' that it gives on average, and its 'images'; and their picture, with
        a row for each.

    Raises:
        ValueError: If the pooling has no such pairs.
    """
    total, images = 0.0, 0
    for batch, chosen, _ in read_views(net, sources, read):
        if chosen is not None:
            found = explain_pairs(net, chosen[0], target, contrast, 1)
            total, images = total + found.shares.double().sum(0), images + len(batch)
    best = (total / images).topk(min(count, len(total)))
    examples: List[List[Tuple[float, int, str, Image.Image]]] = [[] for _ in best.indices]
    number, channels = 0, []
    for batch, chosen, _ in read_views(net, sources, read):
        if chosen is None:
            continue
        pixels, boxes, _ = chosen
        found = explain_pairs(net, pixels, target, contrast, best.indices.tolist())
        channels = found.pairs
        sums = found.maps.double().sum((2, 3)).tolist()
        for i, shown in enumerate(batch):
            number += 1
            for pair, kept in enumerate(examples):
                share = sums[i][pair]
                if len(kept) == _EXAMPLES and share <= kept[0][0]:
                    continue
                small = draw_evidence(shown.image, found.maps[i, pair].double().cpu().numpy(), boxes[i])
                (heapq.heappush if len(kept) < _EXAMPLES else heapq.heapreplace)(
                    kept, (share, -number, shown.name, small)
                )
    told, tiles = [], []
    for (a, b), mean, kept in zip(channels, best.values.tolist(), examples):
        kept.sort(reverse=True)
        told.append(dict(channels=[a, b], evidence=mean, images=[name for _, _, name, _ in kept]))
        for share, _, name, small in kept:
            lines = [(f'channels {a} and {b}: {mean:.3f}', INK), (f'{share:.3f} in {Path(name).name}', GREY)]
            tiles.append(Tile(small, lines))
        tiles += [Tile(None, [(f'channels {a} and {b}: {mean:.3f}', INK)])] * (min(_EXAMPLES, images) - len(kept))
    whole = f'{total.sum() / images:.3f} of all pairs on average'
    title = f'Pairs of channels that give most in {images} images; {whole}'
    return told, draw_sheet(tiles, title, columns=min(_EXAMPLES, images))
