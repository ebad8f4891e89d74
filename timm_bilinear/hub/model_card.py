"""Model cards, with what the model itself, its training and its metrics say."""

import re
from dataclasses import dataclass
from typing import Any, Dict, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args, get_model_input_config
from torch import nn

from ..layers import BilinearHead
from ..models import BilinearCNN
from ..models.image_modes import IMG_MODES
from .checkpoint import Trained

__all__ = ['IMG_MODES', 'METRICS', 'License', 'create_card']

_LOAD = """import timm
import timm_bilinear  # registers bilinear CNNs with timm
import torch
{import_pil}
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
"""
_IMAGE = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = ImageOps.exif_transpose(Image.open('image.jpg'))  # upright, as the camera was held
image = transform(image.convert('{mode}')).unsqueeze(0)
"""
_CLASSIFY = """
with torch.inference_mode():
    probabilities = model(image).softmax(dim=1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for p, i in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{names[i]}: {100 * p:.1f} %')
"""
# of a model that wants images whole, of which one view of a screenshot shows too little
_PREDICT = """import timm
import timm_bilinear

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()

(result,) = timm_bilinear.predict(model, 'image.jpg')  # a photo or screenshot of any shape, looked at in several scales
for prediction in result['predictions']:
    print(f'{{prediction["name"]}}: {{100 * prediction["probability"]:.1f}} %')
"""
_COMPUTE = """
with torch.inference_mode():
    {}
"""
_CITATION = """```bibtex
@inproceedings{lin2015bilinear,
  author = {Tsung-Yu Lin and Aruni RoyChowdhury and Subhransu Maji},
  title = {Bilinear {CNN} Models for Fine-grained Visual Recognition},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year = {2015}
}
```"""
# Figures that a card can tell, all in percent.
METRICS = {'eval_top1': 'top-1, validation', 'eval_top5': 'top-5, validation', 'test_top1': 'top-1, test'}
# Of a run's arguments, those that say how it was trained, not on which machine or under which name.
_TRAINING = (
    'opt momentum lr head_lr weight_decay sched epochs head_epochs freeze warmup_epochs batch_size smoothing'
    ' class_weights patience img_size train_size scale ratio hflip color_jitter train_aug aa mixup cutmix drop'
    ' model_ema pretrained stages val_fraction seed'
).split()
# Paths, and files of weights by their names.
_LOCAL = re.compile(
    r'^(local-dir:|file:|~|\.{1,2}([/\\]|$)|[a-z]:[/\\])|[/\\]|\.(pth|pt|tar|bin|safetensors|npz|pkl)$', re.I
)


@dataclass
class License:
    """Terms of the weights.

    Args:
        id: The Hub's abbreviation.
        name: Name, if that is 'other'.
        link: Where it is to be read.
    """

    id: str
    name: Optional[str] = None
    link: Optional[str] = None


def _public(value: Any) -> Any:
    """A value for the card, without what names a file or folder of the machine; None if nothing is left."""
    if isinstance(value, dict):
        kept = {k: _public(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None} or None
    if isinstance(value, (list, tuple)):
        kept = [_public(v) for v in value]
        return None if any(v is None for v in kept) else value if kept == list(value) else kept
    if isinstance(value, str):
        is_repo = value.lower().startswith(('hf-hub:', 'hf_hub:'))
        return None if not is_repo and _LOCAL.search(value) else value
    return value if isinstance(value, (bool, int, float)) else None


def _precision(args: Dict[str, Any]) -> Optional[str]:
    """What a run computed in, None if its arguments do not tell."""
    if 'stages' in args:  # finetune notes what it resolved 'auto' to
        dtype = args.get('amp_dtype', 'auto') or 'float32'
    elif args.get('model_dtype') or 'amp' not in args:
        return args.get('model_dtype')
    else:  # the train script has a dtype for it, used or not
        dtype = (args.get('amp_dtype') or 'float16') if args['amp'] else 'float32'
    return {'float32': 'float32', 'auto': None}.get(dtype, f'autocast to {dtype}')


def _table(title: str, rows: Dict[str, Any]) -> str:
    if not rows:
        return ''
    lines = '\n'.join(f'| {key} | {str(value).replace("|", chr(92) + "|")} |' for key, value in rows.items())
    return f'## {title}\n\n| | |\n| --- | --- |\n{lines}\n\n'


def _bilinear_head(model: nn.Module) -> Optional[BilinearHead]:
    head = getattr(model, 'head', None)
    return head if isinstance(head, BilinearHead) else None


def _usage(model: nn.Module, repo_id: str, is_classifier: bool, is_whole: bool) -> str:
    """Code that loads the model and does with an image what the model is for."""
    head = _bilinear_head(model)
    channels, height, width = get_model_input_config(model)['input_size']
    mode = IMG_MODES.get(channels)
    if mode and is_classifier and is_whole:
        return f'```python\n{_PREDICT.format(repo_id=repo_id)}```'
    code = _LOAD.format(
        repo_id=repo_id,
        import_pil='from PIL import Image, ImageOps\n' if mode else '',
    )
    if mode:
        code += _IMAGE.format(mode=mode)
    else:
        code += f'image = torch.rand(1, {channels}, {height}, {width})  # normalised as above\n'
    if is_classifier:
        code += _CLASSIFY
    if head is not None and head.pool_type:
        code += _COMPUTE.format('descriptors = model.forward_head(model.forward_features(image), pre_logits=True)')
    elif head is not None:
        code += _COMPUTE.format('features = model.forward_features(image)')
    elif not is_classifier:
        code += _COMPUTE.format('features = model(image)')
    return f'```python\n{code}```'


def _features(model: nn.Module) -> Dict[str, str]:
    """Row of the card about what the classifier sees, or what the model returns without one."""
    head = _bilinear_head(model)
    if head is None:
        return {'features': f'{model.head_hidden_size if model.num_classes else model.num_features:,}'}
    if head.pool is None:
        return {'features': f'map of {model.num_features:,} channels'}
    unit = ' of unit length' if head.pool.is_unit_length else ''
    return {'descriptor': f'{head.num_features:,} entries{unit}'}


def _kind(trained: Trained) -> str:
    """What the model is and where it comes from, in a sentence."""
    if 'stages' in trained.args:
        origin = 'fine-tuned with timm_bilinear'
    elif trained.args:
        origin = "trained with timm's train script"
    else:
        origin = 'published with timm_bilinear'
    head = _bilinear_head(trained.model)
    if head is None:
        return f'The timm model `{trained.model.pretrained_cfg["architecture"]}`, {origin}.'
    what = 'A bilinear CNN' if head.pool_type else 'The streams of a bilinear CNN, without its pooling,'
    return f'{what} ([arXiv 1504.07889](https://arxiv.org/abs/1504.07889)) for timm, {origin}.'


def _metric_names(half: bool, is_measured: bool) -> Dict[str, str]:
    """What figures are called: those of the run are not those of weights that were halved after it."""
    suffix = ' (of the weights in float32, before halving)' if half and not is_measured else ''
    return {key: name + suffix for key, name in METRICS.items()}


def _metadata(
    trained: Trained,
    name: str,
    task: str,
    dataset: Optional[str],
    license: Optional[License],
    metric_names: Dict[str, str],
) -> ModelCardData:
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset or 'imagefolder',
            dataset_name=dataset or 'an image folder',
            metric_type='accuracy',
            metric_name=metric_names[key],
            metric_value=round(value, 2),
        )
        for key, value in trained.metrics.items()
        if key in metric_names
    ]
    return ModelCardData(
        model_name=name,
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['bilinear-cnn'] if isinstance(trained.model, BilinearCNN) else [])],
        license=license and license.id,
        license_name=license and license.name,
        license_link=license and license.link,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )


def create_card(
    trained: Trained,
    repo_id: str,
    dataset: Optional[str] = None,
    license: Optional[License] = None,
    half: bool = False,
    is_measured: bool = False,
) -> ModelCard:
    """Make the card of a trained model.

    It is for others: no file or folder of this machine is named in it.

    Args:
        trained: The model and what is known about it.
        repo_id: Hub repo it will have, 'owner/name'.
        dataset: Name of the dataset it was trained on.
        license: The weights' licence; left out if None.
        half: Weight matrices are stored in half precision.
        is_measured: The metrics are of the weights as they are stored, not as they were trained.

    Returns:
        Card with metadata.
    """
    model, data_config = trained.model, trained.data_config or {}
    head = _bilinear_head(model)
    is_pooled = get_model_args(model).get('global_pool') != '' if head is None else bool(head.pool_type)
    is_classifier = model.num_classes > 0 and is_pooled
    task = 'image-classification' if is_classifier else 'image-feature-extraction'
    name = repo_id.split('/')[-1]
    metric_names = _metric_names(half, is_measured)
    metrics = {metric_names[key]: f'{value:.2f} %' for key, value in trained.metrics.items() if key in metric_names}
    data = _metadata(trained, name, task, dataset, license, metric_names)
    arguments = {k: _public(v) for k, v in get_model_args(model).items() if k != 'num_classes'}
    told = ('epochs', 'head_epochs') if trained.args.get('stages') else ()  # by each of the stages
    args = {key: _public(trained.args.get(key)) for key in _TRAINING if key not in told}
    args['precision'] = _precision(trained.args)
    about = {
        'architecture': model.pretrained_cfg['architecture'],
        **{k: v for k, v in arguments.items() if v is not None},
        **({'classes': model.num_classes} if is_classifier else {}),
        'parameters': f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M',
        **({'stored in': 'float16 (matrices), float32 (the rest); loaded in float32'} if half else {}),
        **_features(model),
        'input': ' x '.join(map(str, data_config.get('input_size', ()))),
        'crop': f'{data_config.get("crop_pct")}, {data_config.get("crop_mode")}',
        'interpolation': data_config.get('interpolation'),
        'mean, std': f'{data_config.get("mean")}, {data_config.get("std")}',
    }
    training = {'dataset': dataset} if dataset else {}
    training.update({k: v for k, v in args.items() if v not in (None, '', [], {}, False)})
    text = (
        f'# {name}\n\n{_kind(trained)}\n\n'
        + _table('Model', about)
        + '## Usage\n\nWith timm_bilinear installed:\n\n'
        + _usage(model, repo_id, is_classifier, is_whole=data_config.get('crop_mode') == 'border')
        + '\n\n'
        + _table('Results', metrics)
        + _table('Training', training)
        + ('' if head is None else f'## Citation\n\n{_CITATION}\n')
    )
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}')
