"""What a page says of one picture: classes, evidence, look-alikes; with a sentence where it cannot."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

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
from .shown_images import ImageReader, choose_views
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
        self.names = Explainer(self.net, None, None).names
        self.read = ImageReader(self.net, next((p.device for p in self.net.parameters()), torch.device('cpu')))
        self.index, self.folder = None, Path()
        if index is not None:
            self.index, self.folder = ImageIndex.load(index), Path(index).resolve().parent
            check_same_model(self.index, self.name, model_key(self.net), index)
        self._lock = threading.Lock()  # one picture at a time: each takes all cores

    def look(self, picture: Union[str, Path, None], contrast: Optional[str] = None, topk: int = _TOPK) -> Sight:
        """
        Args:
            picture: File.
            contrast: Name of a class that the predicted one is compared with.
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
            probabilities, best, evidence, note = self._explain(shown, contrast)
            sentence = f'{self.names[best]}, {100 * probabilities[best]:.1f} %.{note}'
            order = probabilities.argsort(descending=True, stable=True)[:topk].tolist()
            found = [] if self.index is None else self._search(shown, topk)
        return Sight(sentence, {self.names[i]: float(probabilities[i]) for i in order}, evidence, found)

    def _explain(self, shown: Any, contrast: Optional[str]) -> Tuple[torch.Tensor, int, Optional[Image.Image], str]:
        explainer = Explainer(self.net, None, contrast or None)
        chosen = choose_views(self.net, [shown])
        probabilities = chosen[2][0]
        best = int(probabilities.argmax())
        note = ''
        if explainer.contrast == best:
            explainer.contrast, note = None, ' It is the class that it was to be compared with.'
        try:
            _, picture, _ = next(iter(explainer([shown], chosen)))
        except ValueError as e:  # a model whose logits are no sum over locations
            return probabilities, best, None, f' {one_line(e)}'
        return probabilities, best, picture, note

    def _search(self, shown: Any, topk: int) -> List[Tuple[Image.Image, str]]:
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
