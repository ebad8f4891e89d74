"""Vectors of images to compare by their cosine: descriptors, made short by a sketch or by principal components."""

from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import nn

from .inference import autocast, resolve_tta, view_data_config, views
from .prediction import Decoded, Source, iterate_images

__all__ = ['REDUCTIONS', 'Reduction', 'describe', 'iterate_descriptors']

REDUCTIONS = ('sketch', 'pca', 'none')
_SKETCH = 8192  # what longer descriptors are sketched to before their principal components are taken
_SEED = 0


@torch.inference_mode()
def describe(model: nn.Module, images: torch.Tensor, amp_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """Descriptors of unit length of a batch of images: the mean over the views that `predict` takes, normalised again.

    Args:
        model: The model, in eval mode.
        images: (B, C, H, W) on the model's device, preprocessed by `view_data_config(model, 'auto')`.
        amp_dtype: Dtype to autocast to, None for the model's own.

    Returns:
        (B, D) float32.

    Raises:
        ValueError: If the model has no descriptors.
    """
    inner = unwrap_model(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    total = torch.zeros(())
    for view in views(images, resolve_tta(model, 'auto'), view_data_config(model)['input_size'][1:]):
        with autocast(images.device, amp_dtype):
            features = inner.forward_features(view.to(dtype, memory_format=torch.channels_last))
            vectors = inner.forward_head(features, pre_logits=True)
        if vectors.ndim != 2:
            raise ValueError(f"'model' gives no descriptors (B, D), but {tuple(vectors.shape)}.")
        total = total.to(vectors.device) + F.normalize(vectors.float())
    return F.normalize(total)


def iterate_descriptors(
    net: nn.Module,
    sources: Sequence[Source],
    batch_size: int,
    workers: Optional[int] = None,
    amp_dtype: Optional[torch.dtype] = None,
) -> Iterator[Tuple[List[Decoded], torch.Tensor]]:
    """Descriptors of images, a batch at a time.

    Args:
        net: The model, in eval mode.
        sources: Images, of `find_sources`.
        batch_size, workers: As for `predict`.
        amp_dtype: As for `describe`.

    Yields:
        What became of each source, with an error if it cannot be read or its descriptor is not finite, and the
        descriptors (B, D), float32, of those without an error.
    """
    for entries, pixels in iterate_images(net, sources, batch_size, workers, 'auto'):
        descriptors = describe(net, pixels, amp_dtype)
        is_finite = descriptors.isfinite().all(1)
        left = iter(is_finite.tolist())
        for i, entry in enumerate(entries):
            if entry.image is not None and not next(left):
                error = f"The model gives a descriptor of '{entry.name}' that is not finite."
                entries[i] = entry._replace(image=None, error=error)
        yield entries, descriptors[is_finite]


class Reduction:
    """From descriptors to vectors of few numbers and unit length.

    'sketch': a count sketch (Charikar, Chen, Farach-Colton, 2002), in which each entry is added to one place with one
    sign, both random; products of sketches are those of the descriptors in expectation, whatever images there are.
    'pca': the components along which some images vary most, of the descriptors sketched to 8192 numbers if they are
    longer. 'none': the descriptors themselves.

    Args:
        kind: One of `REDUCTIONS`.
        in_features: Size of the descriptors.
        dim: Size of the vectors; that of the descriptors if it is larger.

    Raises:
        ValueError: If there is no such kind.
    """

    def __init__(self, kind: str, in_features: int, dim: int):
        if kind not in REDUCTIONS:
            raise ValueError(f"'reduce' must be one of {', '.join(map(repr, REDUCTIONS))}, got {kind!r}.")
        self.kind = 'none' if kind == 'sketch' and dim >= in_features else kind
        self.in_features = in_features
        self.dim = in_features if self.kind == 'none' else dim
        self.mean: Optional[torch.Tensor] = None
        self.components: Optional[torch.Tensor] = None

    def fit(self, descriptors: torch.Tensor):
        """Find the principal components of descriptors (N, D), if they are wanted.

        Raises:
            ValueError: If there are fewer images than components.
        """
        if self.kind != 'pca':
            return
        x = self._sketch(descriptors, _SKETCH).double()
        if len(x) <= self.dim or x.shape[1] < self.dim:
            raise ValueError(
                f'{len(x)} descriptors of {x.shape[1]} numbers do not have {self.dim} principal components: give a'
                " smaller 'dim', or 'sketch'."
            )
        self.mean = x.mean(0)
        _, _, components = torch.linalg.svd(x - self.mean, full_matrices=False)
        self.mean, self.components = self.mean.float(), components[: self.dim].T.float().contiguous()

    def __call__(self, descriptors: torch.Tensor) -> torch.Tensor:
        """Vectors (N, dim), float32, of descriptors (N, D)."""
        if self.kind == 'none':
            return descriptors
        if self.kind == 'sketch':
            return F.normalize(self._sketch(descriptors, self.dim))
        x = self._sketch(descriptors, _SKETCH)
        return F.normalize((x - self.mean.to(x.device)) @ self.components.to(x.device))

    def _sketch(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if x.shape[1] <= dim:
            return x
        generator = torch.Generator().manual_seed(_SEED)
        places = torch.randint(dim, (x.shape[1],), generator=generator).to(x.device)
        signs = (2 * torch.randint(2, (x.shape[1],), generator=generator) - 1).to(x)
        return torch.zeros(len(x), dim, dtype=x.dtype, device=x.device).index_add_(1, places, x * signs)

    def settings(self) -> Dict[str, object]:
        """What says which reduction it is."""
        return dict(reduce=self.kind, in_features=self.in_features, dim=self.dim)

    def tensors(self) -> Dict[str, torch.Tensor]:
        """What was found by `fit`."""
        return {} if self.mean is None else dict(mean=self.mean, components=self.components)

    def load_tensors(self, tensors: Dict[str, torch.Tensor]):
        """Take what `tensors` gave."""
        self.mean, self.components = tensors.get('mean'), tensors.get('components')
