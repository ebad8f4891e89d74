"""The explain command: pictures and numbers of where the evidence for a class lies in images."""

import json
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.utils import unwrap_model
from torch import nn

from ..hub.partial import partial_path
from .channel_pairs import draw_channel_pairs
from .evidence import REST, Evidence, best_class, check_pairs, explain, explain_beside
from .evidence_pictures import Panel, draw_evidence, draw_panels
from .inference import label_descriptions, label_names, load, model_name
from .interrupt import Interrupted, Terminated
from .pictures import GREY, INK, RIGHT, WRONG, Tile, draw_sheet
from .prediction import find_sources, one_line
from .prediction_files import check_targets, json_writer, printable
from .shown_images import Box, ChosenViews, ImageReader, ShownImage, read_views

__all__ = ['run_explain']

_TOOL = 'timm-bilinear explain'
_RESULTS = 'explain.json'
_RESERVED = (_RESULTS, 'sheet.png', 'pairs.png')
_SHEET = 50  # images on the sheet at most
_REST_NAME = 'the other classes'


def find_class(name: str, labels: Sequence[str], descriptions: Sequence[str], option: str) -> int:
    """Index of the class that a user names: its label, what people call it, or its number.

    Raises:
        ValueError: If there is none, or several of this name.
    """
    for names in (labels, descriptions):
        found = [i for i, known in enumerate(names) if known == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"'{option}' {name!r} names {len(found)} classes; give the index of one: {found}.")
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    close = [known for known in descriptions if name.lower() in known.lower()][:5]
    hint = f' Is it one of {", ".join(map(repr, close))}?' if close else ''
    raise ValueError(f"'{option}' names no class of the model: {name!r}.{hint}")


class PictureFolder:
    """The folder of pictures: the first one replaces what an earlier run left in it, what others did is refused.

    Args:
        path: Folder.
        json_file: File of the numbers, which may lie in the folder too.

    Raises:
        FileExistsError: If it has files that no earlier run wrote.
        OSError: If it cannot be read.
        ValueError: If the file of the numbers has the name of another one.
    """

    def __init__(self, path: Union[str, Path], json_file: Optional[str] = None):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"'{self.path}' is not a folder.")
        self.json_name: Optional[str] = None
        if json_file not in (None, '-') and Path(json_file).parent.resolve() == self.path.resolve():
            self.json_name = Path(json_file).name
            if self.json_name.lower() in _RESERVED:
                raise ValueError(f"'json' is '{json_file}', a file that explain writes itself: give another name.")
        self._earlier: List[str] = []
        try:
            results = json.loads((self.path / _RESULTS).read_text())
            if results['tool'] == _TOOL:
                self._earlier = [_RESULTS, *(name for name in results['files'] if Path(name).name == name)]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        found = {p.name for p in self.path.iterdir() if not p.name.startswith('.')} if self.path.exists() else set()
        foreign = sorted(found - set(self._earlier))
        if foreign:
            raise FileExistsError(f"'{self.path / foreign[0]}' was not written by explain; give another folder.")
        self.has_begun = False
        self.files: List[str] = []

    def _begin(self):
        """Remove what an earlier run left, now that there is something to put in its place."""
        if self.has_begun:
            return
        self.has_begun = True
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self._earlier:
            if name != self.json_name:  # which is replaced once it is whole
                (self.path / name).unlink(missing_ok=True)

    def name_for(self, image: str) -> str:
        """A new file name for the picture of an image."""
        stem = ''.join(c if c.isalnum() or c in '-_.' else '_' for c in Path(image).stem)[:80].strip('.') or 'image'
        name, number = f'{stem}.png', 1
        while name.lower() in {f.lower() for f in (*self.files, *_RESERVED, self.json_name or '')}:
            number += 1
            name = f'{stem}_{number}.png'
        return name

    def save(self, name: str, image: Image.Image):
        self._begin()
        with partial_path(self.path, '.explain.', '.png') as partial:
            image.save(partial)
            partial.replace(self.path / name)
        self.files.append(name)

    def finish(self, about: Dict[str, Any]):
        """List what was written, which tells the next run what is its own."""
        self._begin()
        has_json = self.json_name is not None and (self.path / self.json_name).exists()
        files = [*self.files, self.json_name] if has_json else self.files
        with partial_path(self.path, '.explain.', '.json') as partial:
            partial.write_text(json.dumps(dict(tool=_TOOL, **about, files=files), indent=1) + '\n')
            partial.replace(self.path / _RESULTS)


def _number(value: float) -> str:
    return f'{value:.3f}' if abs(value) < 1000 else f'{value:.4g}'


def _array(map_: torch.Tensor) -> np.ndarray:
    return map_.double().cpu().numpy()


class Explainer:
    """Evidence of one image after another, as pictures and as what JSON says of it."""

    def __init__(self, net: nn.Module, target: Optional[str], contrast: Optional[str]):
        self.net = net
        self.names = label_descriptions(net)
        classes = unwrap_model(net).num_classes
        if len(self.names) != classes:
            self.names = [str(i) for i in range(classes)]
        self.labels = label_names(net) if len(label_names(net)) == classes else self.names
        self.target = None if target is None else find_class(target, self.labels, self.names, 'target')
        self.contrast: Union[int, str, None] = contrast
        if contrast is not None and (contrast != REST or REST in (*self.labels, *self.names)):
            self.contrast = find_class(contrast, self.labels, self.names, 'contrast')
        if self.contrast == REST and classes < 2:
            raise ValueError(f"'contrast' is '{REST}', but the model has no other class.")
        if self.target is not None and self.target == self.contrast:
            raise ValueError(f"'target' and 'contrast' are both {self.names[self.target]!r}.")

    def __call__(
        self, batch: Sequence[ShownImage], chosen: ChosenViews
    ) -> Iterator[Tuple[Dict[str, Any], Optional[Tuple[Image.Image, Image.Image]]]]:
        """What is said of each image, and its picture with a small one for the sheet; without them, what went wrong.

        Args:
            batch: Images.
            chosen: What `choose_views` gave for them, with finite probabilities.
        """
        pixels, boxes, probabilities = chosen
        target = self.target
        if target is None:  # by all views, as `predict` says it; the one that is explained may be of another opinion
            contrast = self.contrast if isinstance(self.contrast, int) else None
            against = None if contrast is None else torch.full_like(probabilities[:, 0], contrast, dtype=torch.int64)
            target = best_class(probabilities, against)
        rather: Optional[Evidence] = None
        with torch.inference_mode(False):
            if len(self.names) == 1:
                one = explain(self.net, pixels, target)
            else:
                one, rather = explain_beside(self.net, pixels, target, REST if self.contrast is None else self.contrast)
        for i, shown in enumerate(batch):
            try:
                drawn = self._draw(shown, boxes[i], one, rather, i, probabilities)
            except Exception as e:  # what is wrong with one image is no matter of the others
                drawn = dict(image=shown.name, error=one_line(e)), None
            yield drawn

    def _draw(
        self,
        shown: ShownImage,
        box: Box,
        one: Evidence,
        rather: Optional[Evidence],
        i: int,
        probabilities: torch.Tensor,
    ) -> Tuple[Dict[str, Any], Tuple[Image.Image, Image.Image]]:
        for found in (one, rather):
            if found is not None and not (found.logit[i].isfinite() and found.maps[i].isfinite().all()):
                raise ValueError('The evidence is not finite.')
        told = self._tell(shown, box, one, i, probabilities)
        values = _array(one.maps[i])
        panels = [Panel([Path(shown.name).name]), Panel(self._lines(told['target']), values)]
        title = f'What speaks for {told["target"]["name"]}'
        if rather is not None:
            other = self._other(one, rather, i, probabilities)
            if isinstance(self.contrast, int):
                panels.append(Panel(self._lines(other), values - _array(rather.maps[i])))
            what = f'{told["target"]["name"]} rather than {other["name"]}'
            difference, evidence = float(rather.logit[i]), float(rather.maps[i].sum())
            lines = [what, f'difference {_number(difference)}, evidence {_number(evidence)}']
            panels.append(Panel(lines, _array(rather.maps[i])))
            if self.contrast is not None:
                told['contrast'] = other
                title = f'What speaks for {what}'
                values = _array(rather.maps[i])
        told['map'] = values.tolist()
        return told, (draw_panels(shown.image, title, panels, box), draw_evidence(shown.image, values, box))

    def _class(self, found: Evidence, i: int, probabilities: torch.Tensor) -> Dict[str, Any]:
        index = int(found.target[i])
        told = dict(name=self.names[index], index=index, probability=float(probabilities[i, index]))
        told.update(logit=float(found.logit[i]), bias=float(found.bias[i]), evidence=float(found.maps[i].sum()))
        if found.unlocated[i]:
            told['unlocated'] = float(found.unlocated[i])
        return told

    def _other(self, one: Evidence, rather: Evidence, i: int, probabilities: torch.Tensor) -> Dict[str, Any]:
        """What `_class` tells, of what the class is compared with."""
        if isinstance(rather.contrast, str):
            told = dict(name=_REST_NAME, index=None, probability=float(1 - probabilities[i, one.target[i]]))
        else:
            index = int(rather.contrast[i])
            told = dict(name=self.names[index], index=index, probability=float(probabilities[i, index]))
        for name in ('logit', 'bias', 'unlocated'):
            value = float(getattr(one, name)[i]) - float(getattr(rather, name)[i])
            if name != 'unlocated' or one.unlocated[i]:
                told[name] = value
        told['evidence'] = float(one.maps[i].sum()) - float(rather.maps[i].sum())
        return told

    def _tell(
        self, shown: ShownImage, box: Box, found: Evidence, i: int, probabilities: torch.Tensor
    ) -> Dict[str, Any]:
        best = int(probabilities[i].argmax())
        prediction = dict(name=self.names[best], index=best, probability=float(probabilities[i, best]))
        return dict(
            image=shown.name,
            error=None,
            prediction=prediction,
            target=self._class(found, i, probabilities),
            contrast=None,
            box=list(box),
        )

    @staticmethod
    def _lines(told: Dict[str, Any]) -> List[str]:
        logit, bias, evidence = (_number(told[k]) for k in ('logit', 'bias', 'evidence'))
        token = f' + class token {_number(told["unlocated"])}' if 'unlocated' in told else ''
        return [
            f'{told["name"]}, {100 * told["probability"]:.1f} %',
            f'logit {logit} = bias {bias} + evidence {evidence}{token}',
        ]


def run_explain(
    model: Union[str, Path, nn.Module],
    images: Sequence[Any],
    output: Union[str, Path],
    target: Optional[str] = None,
    contrast: Optional[str] = None,
    json: Optional[str] = None,
    pairs: int = 0,
    device: Optional[str] = None,
    label_names: Any = None,
) -> int:
    """Explain what a model sees in images, in pictures and numbers.

    Args:
        model: As for `predict`.
        images: As for `predict`.
        output: Folder for a picture of each image, a sheet of several, and explain.json.
        target: Class to explain: its label, description or index; None for the predicted one of each image.
        contrast: Class that it is compared with, or 'rest' for the mean of all others, if no class is called so.
        json: File for a list of the numbers and maps, '-' for stdout.
        pairs: Pairs of channels, those that give most to the target over all images, to draw into pairs.png.
        device, label_names: As for `predict`.

    Returns:
        Exit code: 0, or 1 if an image could not be explained.

    Raises:
        OSError, RuntimeError, TypeError, ValueError: As for `predict`, and if there is no such class or folder.
    """
    if json is not None:
        check_targets(json, None)
    if pairs and target is None:
        raise ValueError("'pairs' are of one class: name it as 'target'.")
    sources = list(find_sources(images))
    if not sources:
        raise ValueError("'images' are empty: name at least one file, folder or pattern.")
    folder = PictureFolder(output, json)
    net = load(model, device, label_names)
    explainer = Explainer(net, target, contrast)
    if pairs:
        check_pairs(net)
    read = ImageReader(net, next((p.device for p in net.parameters()), torch.device('cpu')))
    tiles: List[Tile] = []
    failed = done = 0
    try:
        with ExitStack() as stack:
            write = stack.enter_context(json_writer(os.fspath(json))) if json is not None else None
            for batch, chosen, errors in read_views(net, sources, read):
                for told, pictures in explainer(batch, chosen) if chosen is not None else ():
                    if pictures is None:
                        errors.append(told)
                        continue
                    told['picture'] = folder.name_for(told['image'])
                    folder.save(told['picture'], pictures[0])
                    tiles.append(_tile(told, pictures[1]))
                    done += 1
                    _write(told, write)
                for error in errors:
                    failed += 1
                    print(f'timm-bilinear: error: {printable(error["image"])}: {error["error"]}', file=sys.stderr)
                    if write is not None:
                        write(error)
        if done > 1:
            shown = tiles[:_SHEET]
            some = f', the first {_SHEET} of {done}' if done > _SHEET else ''
            folder.save('sheet.png', draw_sheet(shown, f'Evidence by {model_name(net)}{some}'))
        about = dict(model=model_name(net), images=done)
        if pairs and done:
            told, picture = draw_channel_pairs(net, sources, read, explainer.target, explainer.contrast, pairs)
            folder.save('pairs.png', picture)
            about.update(pairs=told)
        folder.finish(about)
    except BaseException as e:
        if folder.has_begun:  # the next run is to know its own
            with suppress(OSError):
                folder.finish(dict(model=model_name(net), images=done))
        if not isinstance(e, KeyboardInterrupt):
            raise
        code = 143 if isinstance(e, Terminated) else 130
        where = f"the pictures are in '{folder.path}'" if folder.has_begun else 'nothing was written'
        raise Interrupted(f'Stopped after {done} of {len(sources)} images, {where}.', code) from e
    where = f"'{folder.path}' has {len(folder.files)} picture{'s' * (len(folder.files) != 1)}"
    print(f'timm-bilinear: {where}{f", {failed} images have none" if failed else ""}.', file=sys.stderr)
    return 1 if failed else 0


def _tile(told: Dict[str, Any], small: Image.Image) -> Tile:
    is_right = told['prediction']['index'] == told['target']['index']
    lines = [
        (told['target']['name'], INK),
        (f'{100 * told["target"]["probability"]:.1f} %', RIGHT if is_right else WRONG),
    ]
    if told['contrast'] is not None:
        lines.append((f'rather than {told["contrast"]["name"]}', GREY))
    return Tile(small, [*lines, (Path(told['image']).name, GREY)])


def _write(told: Dict[str, Any], write):
    if write is not None:
        write(told)
        return
    one, other = told['target'], told['contrast']
    rather = '' if other is None else f', {printable(other["name"])} {_number(other["logit"])}'
    print(
        f'{printable(told["image"])}: {printable(one["name"])} {100 * one["probability"]:.1f} %, logit'
        f' {_number(one["logit"])}{rather}: {told["picture"]}'
    )
