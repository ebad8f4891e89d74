"""Look up fonts that were in no training set: queries of one renderer in a gallery of another.

    python hub/fonts/build.py unseen --npm $(python hub/fonts/retrieval.py --families)
    python hub/fonts/chromium.py unseen images/unseen_chromium --count 1
    python hub/fonts/pango.py unseen images/unseen_pango --count 2
    python hub/fonts/retrieval.py hub/FOLDER images/unseen_chromium images/unseen_pango

Descriptors, of the views that `predict` takes, are compared by their cosine. A gallery's image is right if it is of the
query's font, or, told apart, of its family.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from timm_bilinear.data.folder import create_split
from timm_bilinear.data.loader import create_loader
from timm_bilinear.tools.inference import autocast, load, resolve_amp_dtype, resolve_tta, view_data_config, views

__all__ = ['FAMILIES', 'describe', 'score']

# Google Fonts families that are not among those of GoogleFontsBench.
FAMILIES = (
    'abril-fatface alegreya anton archivo arvo barlow bitter cabin cardo cinzel comfortaa cormorant-garamond '
    'crimson-text dancing-script dosis eb-garamond exo-2 fira-sans fjalla-one heebo hind ibm-plex-sans '
    'ibm-plex-serif inconsolata josefin-sans kanit karla lato libre-baskerville libre-franklin lobster manrope mulish '
    'noto-serif oswald oxygen pacifico prompt quicksand raleway rubik signika source-sans-3 source-serif-4 spectral '
    'teko titillium-web ubuntu vollkorn zilla-slab'
).split()
_RECALLS = (1, 2, 4, 8)


@torch.inference_mode()
def describe(model: nn.Module, images: Path) -> Tuple[torch.Tensor, List[str]]:
    """Descriptors (N, D) of unit length of the images of a folder's test split, and the names of their folders.

    A descriptor is the mean over the image's views, of unit length again.
    """
    data = create_split(images, 'test')
    test, names = data.splits['test'], data.class_names
    tta = resolve_tta(model, 'auto')
    size = view_data_config(model)['input_size'][1:]
    amp_dtype = resolve_amp_dtype('auto', torch.device('cpu'))
    parts, labels = [], []
    for pixels, targets in tqdm(create_loader(test, view_data_config(model, tta), 16), images.name, unit='batch'):
        total = 0.0
        for view in views(pixels, tta, size):
            with autocast(torch.device('cpu'), amp_dtype):
                features = model.forward_features(view.to(memory_format=torch.channels_last))
                total = total + model.forward_head(features, pre_logits=True).float()
        parts.append(F.normalize(total))
        labels += [names[i] for i in targets.tolist()]
    return torch.cat(parts), labels


def score(
    queries: torch.Tensor, query_labels: List[str], gallery: torch.Tensor, gallery_labels: List[str]
) -> Dict[str, float]:
    """Recall at 1, 2, 4 and 8, and MAP@R (Musgrave et al., https://arxiv.org/abs/2003.08505), in percent.

    Args:
        queries: (Q, D) descriptors of unit length.
        query_labels: Q names.
        gallery: (G, D) descriptors of unit length, of other images.
        gallery_labels: G names.

    Raises:
        ValueError: If a query has no image of its name in the gallery.
    """
    sums = dict.fromkeys([*(f'recall@{k}' for k in _RECALLS), 'MAP@R'], 0.0)
    order = (queries @ gallery.T).argsort(dim=1, descending=True, stable=True)
    for name, row in zip(query_labels, order.tolist()):
        relevant = gallery_labels.count(name)
        if relevant == 0:
            raise ValueError(f"The gallery has no image of '{name}'.")
        right = [gallery_labels[i] == name for i in row]
        for k in _RECALLS:
            sums[f'recall@{k}'] += any(right[:k])
        sums['MAP@R'] += sum(sum(right[: i + 1]) / (i + 1) for i in range(relevant) if right[i]) / relevant
    return {key: 100 * value / len(query_labels) for key, value in sums.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, nargs='?', help='folder with config.json and model.safetensors')
    parser.add_argument('queries', type=Path, nargs='?', help='images of one renderer, with test/FONT')
    parser.add_argument('gallery', type=Path, nargs='?', help='images of another')
    parser.add_argument('--families', action='store_true', help='only name families that are in no training set')
    parser.add_argument('--json', type=Path, help='file for the scores, which publish.py puts into the card')
    args = parser.parse_args()
    if args.families:
        print(' '.join(FAMILIES))
        return
    if args.gallery is None:
        parser.error('a model, queries and a gallery are needed')
    try:
        model = load(args.model, device='cpu')
        queries, gallery = (describe(model, images) for images in (args.queries, args.gallery))
        rows = []
        for what, of in (('font', str), ('family', lambda name: name.split('-latin-')[0])):
            labels, found = ([of(name) for name in each[1]] for each in (queries, gallery))
            print(f'{len(labels)} queries, gallery of {len(found)} images, by {what} of {len(set(found))}:')
            scores = score(queries[0], labels, gallery[0], found)
            print('  ' + ', '.join(f'{name} {value:.1f} %' for name, value in scores.items()))
            sizes = dict(queries=len(labels), gallery=len(found), labels=len(set(found)))
            rows.append(dict(what=what, renderers=[args.queries.name, args.gallery.name], **sizes, scores=scores))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'retrieval.py: error: {e}')


if __name__ == '__main__':
    main()
