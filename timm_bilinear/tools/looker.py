"""What a page says of one picture: classes, evidence, look-alikes; with a sentence where it cannot."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.utils import unwrap_model
from torch import nn

from ..data.images import open_image
from .explain import Explainer
from .index import check_same_model, model_key
from .index_file import ImageIndex
from .inference import load, model_name
from .prediction import Source, one_line
from .shown_images import NOT_FINITE, ChosenViews, ImageReader, ShownImage, choose_views
from .vectors import describe

__all__ = ['Looker', 'Sight']

_TOPK = 5


@dataclass
class Sight:
    """What is said of a picture.

    Args:
        sentence: The answer, or why there is none.
        probabilities: By class name, the highest first; none where there is no answer.
        evidence: Picture of the evidence; None for a model that has none, or without an answer.
        found: Pictures that look alike, with what is said of each.
    """

    sentence: str
    probabilities: Dict[str, float] = field(default_factory=dict)
    evidence: Optional[Image.Image] = None
    found: List[Tuple[Image.Image, str]] = field(default_factory=list)


def _distinct_names(names: Sequence[str], labels: Sequence[str]) -> List[str]:
    """Names of classes, with the label, or else the index, behind those that several classes have."""
    keys = labels if len(set(labels)) == len(labels) else range(len(names))
    counts = Counter(names)
    return [f'{name} ({key})' if counts[name] > 1 else name for name, key in zip(names, keys)]


class Looker:
    """A model, and perhaps an index, that pictures are shown to one at a time.

    Args:
        model: As for `predict`.
        index: Index of images, made with the model.
        device: As for `predict`.

    Raises:
        OSError, TypeError, ValueError: As for `load`, and if the index is none or of another model.
    """

    def __init__(
        self, model: Union[str, Path, nn.Module], index: Union[str, Path, None] = None, device: Optional[str] = None
    ):
        self.net = load(model, device)
        if not getattr(unwrap_model(self.net), 'num_classes', 0):
            raise ValueError("'model' has no classifier, so there is nothing to say.")
        self.name = model_name(self.net)
        explainer = Explainer(self.net, None, None)
        self.names = _distinct_names(explainer.names, explainer.labels)
        self.read = ImageReader(self.net, next((p.device for p in self.net.parameters()), torch.device('cpu')))
        self.index, self.folder = None, Path()
        if index is not None:
            self.index, self.folder = ImageIndex.load(index), Path(index).resolve().parent
            check_same_model(self.index, self.name, model_key(self.net), index)
        self._lock = threading.Lock()  # one picture at a time: each takes all cores

    def look(self, picture: Union[str, Path, None], contrast: Optional[int] = None, topk: int = _TOPK) -> Sight:
        """
        Args:
            picture: File.
            contrast: Index of a class that the predicted one is compared with.
            topk: Classes, and look-alikes, that are told.
        """
        if picture is None:
            return Sight('Drop a picture.')
        try:
            shown = self.read(Source(Path(picture).name, picture))
        except Exception as e:
            why = one_line(e).replace(str(picture), Path(picture).name)  # where it lies here is nobody's business
            return Sight(f'This is no picture that can be read: {why}')
        with self._lock:
            chosen = choose_views(self.net, [shown])
            probabilities = chosen[2][0]
            if not probabilities.isfinite().all():
                return Sight(NOT_FINITE)
            best = int(probabilities.argmax())
            evidence, note = self._explain(shown, chosen, best, contrast)
            sentence = f'{self.names[best]}, {100 * probabilities[best]:.1f} %.{note}'
            order = probabilities.argsort(descending=True, stable=True)[:topk].tolist()
            found = [] if self.index is None else self._search(shown, topk)
        return Sight(sentence, {self.names[i]: float(probabilities[i]) for i in order}, evidence, found)

    def _explain(
        self, shown: ShownImage, chosen: ChosenViews, best: int, contrast: Optional[int]
    ) -> Tuple[Optional[Image.Image], str]:
        """Picture of the evidence, or None, and what is to be said of it."""
        explainer = Explainer(self.net, None, None)
        explainer.names = self.names
        note = ''
        if contrast == best:
            note = ' It is the class that it was to be compared with.'
        else:
            explainer.contrast = contrast
        try:
            ((told, pictures),) = explainer([shown], chosen)
        except ValueError as e:  # a model whose logits are no sum over locations
            return None, f' {one_line(e)}'
        return (None, f' {told["error"]}') if pictures is None else (pictures[0], note)

    def _search(self, shown: ShownImage, topk: int) -> List[Tuple[Image.Image, str]]:
        views = torch.cat(list(shown.views), dim=-2)[None]
        scores, places = self.index.search(self.index.reduction(describe(self.net, views)).cpu(), topk)
        found = []
        for score, place in zip(scores[0].tolist(), places[0].tolist()):
            row = self.index.rows[place]
            try:
                image = open_image(self.folder / row.path, min_size=448)
            except (OSError, ValueError):  # moved since it was indexed
                continue
            image.thumbnail((448, 448))
            found.append((image, f'{row.label or Path(row.path).name}, {score:.3f}'))
        return found
