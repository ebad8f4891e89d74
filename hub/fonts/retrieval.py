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
from typing import List, Tuple

import torch
from torch import nn
from tqdm import tqdm

from timm_bilinear import retrieval_metrics
from timm_bilinear.data.folder import create_split
from timm_bilinear.data.loader import create_loader
from timm_bilinear.tools.inference import load, resolve_amp_dtype, view_data_config
from timm_bilinear.tools.vectors import describe

__all__ = ['FAMILIES', 'describe_images']

# Google Fonts families that are not among those of GoogleFontsBench.
FAMILIES = (
    'abril-fatface alegreya anton archivo arvo barlow bitter cabin cardo cinzel comfortaa cormorant-garamond '
    'crimson-text dancing-script dosis eb-garamond exo-2 fira-sans fjalla-one heebo hind ibm-plex-sans '
    'ibm-plex-serif inconsolata josefin-sans kanit karla lato libre-baskerville libre-franklin lobster manrope mulish '
    'noto-serif oswald oxygen pacifico prompt quicksand raleway rubik signika source-sans-3 source-serif-4 spectral '
    'teko titillium-web ubuntu vollkorn zilla-slab'
).split()
_MEASURES = ('recall@1', 'recall@2', 'recall@4', 'recall@8', 'MAP@R')


def describe_images(model: nn.Module, images: Path) -> Tuple[torch.Tensor, List[str]]:
    """Descriptors (N, D) of unit length of the images of a folder's test split, and the names of their folders."""
    data = create_split(images, 'test')
    amp_dtype = resolve_amp_dtype('auto', torch.device('cpu'))
    parts, labels = [], []
    loader = create_loader(data.splits['test'], view_data_config(model, 'auto'), 16)
    for pixels, targets in tqdm(loader, images.name, unit='batch'):
        parts.append(describe(model, pixels, amp_dtype))
        labels += [data.class_names[i] for i in targets.tolist()]
    return torch.cat(parts), labels


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
        queries, gallery = (describe_images(model, images) for images in (args.queries, args.gallery))
        rows = []
        for what, of in (('font', str), ('family', lambda name: name.split('-latin-')[0])):
            labels, found = ([of(name) for name in each[1]] for each in (queries, gallery))
            print(f'{len(labels)} queries, gallery of {len(found)} images, by {what} of {len(set(found))}:')
            scores = retrieval_metrics(queries[0], labels, gallery[0], found)
            scores = {name: scores[name] for name in _MEASURES}
            print('  ' + ', '.join(f'{name} {value:.1f} %' for name, value in scores.items()))
            sizes = dict(queries=len(labels), gallery=len(found), labels=len(set(found)))
            rows.append(dict(what=what, renderers=[args.queries.name, args.gallery.name], **sizes, scores=scores))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    except (OSError, RuntimeError, ValueError) as e:
        sys.exit(f'retrieval.py: error: {e}')


if __name__ == '__main__':
    main()
