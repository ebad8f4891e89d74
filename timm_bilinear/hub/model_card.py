"""Model cards, with what the model itself, its training and its metrics say."""

from typing import Any, Dict, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args, get_model_input_config
from torch import nn

from ..layers import BilinearHead
from ..layers.pooling import ExactPooling
from .checkpoint import Trained

__all__ = ['IMG_MODES', 'create_card']

# PIL's mode of images with that many channels.
IMG_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}

_LOAD = """import timm
{import_ours}import torch
{import_pil}
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
"""
_IMAGE = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open('image.jpg').convert('{mode}')).unsqueeze(0)
"""
_CLASSIFY = """
with torch.inference_mode():
    probabilities = model(image).softmax(dim=1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for p, i in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{names[i]}: {100 * p:.1f} %')
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
_METRICS = {'eval_top1': 'top-1, validation', 'eval_top5': 'top-5, validation', 'test_top1': 'top-1, test'}
# Of a run's arguments, those that say how it was trained, not on which machine or under which name.
_TRAINING = (
    'opt momentum lr weight_decay sched epochs head_epochs warmup_epochs batch_size smoothing img_size train_size'
    ' scale ratio hflip color_jitter aa mixup cutmix drop amp amp_dtype model_ema pretrained initial_checkpoint stages'
    ' seed'
).split()


def _table(title: str, rows: Dict[str, Any]) -> str:
    if not rows:
        return ''
    lines = '\n'.join(f'| {key} | {str(value).replace("|", chr(92) + "|")} |' for key, value in rows.items())
    return f'## {title}\n\n| | |\n| --- | --- |\n{lines}\n\n'


def _bilinear_head(model: nn.Module) -> Optional[BilinearHead]:
    head = getattr(model, 'head', None)
    return head if isinstance(head, BilinearHead) else None


def _usage(model: nn.Module, repo_id: str, is_classifier: bool) -> str:
    """Code that loads the model and does with an image what the model is for."""
    head = _bilinear_head(model)
    channels, height, width = get_model_input_config(model)['input_size']
    mode = IMG_MODES.get(channels)
    code = _LOAD.format(
        repo_id=repo_id,
        import_ours='' if head is None else 'import timm_bilinear  # registers bilinear CNNs with timm\n',
        import_pil='from PIL import Image\n' if mode else '',
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
    unit = ' of unit length' if isinstance(head.pool, ExactPooling) else ''
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


def create_card(
    trained: Trained,
    repo_id: str,
    dataset: Optional[str] = None,
    license: Optional[str] = None,
) -> ModelCard:
    """Make the card of a trained model.

    Args:
        trained: The model and what is known about it.
        repo_id: Hub repo it will have, 'owner/name'.
        dataset: Name of the dataset it was trained on.
        license: The weights' licence, as the Hub abbreviates it; left out if None.

    Returns:
        Card with metadata.
    """
    model, data_config = trained.model, trained.data_config or {}
    head = _bilinear_head(model)
    is_pooled = get_model_args(model).get('global_pool') != '' if head is None else bool(head.pool_type)
    is_classifier = model.num_classes > 0 and is_pooled
    task = 'image-classification' if is_classifier else 'image-feature-extraction'
    name = repo_id.split('/')[-1]
    metrics = {_METRICS[key]: f'{value:.2f} %' for key, value in trained.metrics.items() if key in _METRICS}
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset or 'imagefolder',
            dataset_name=dataset or 'an image folder',
            metric_type='accuracy',
            metric_name=_METRICS[key],
            metric_value=round(value, 2),
        )
        for key, value in trained.metrics.items()
        if key in _METRICS
    ]
    data = ModelCardData(
        model_name=name,
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['bilinear-cnn'] if head is not None else [])],
        license=license,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )
    arguments = {k: v for k, v in get_model_args(model).items() if k != 'num_classes'}
    args = {key: trained.args[key] for key in _TRAINING if trained.args.get(key) not in (None, '', [], {}, False)}
    about = {
        'architecture': model.pretrained_cfg['architecture'],
        **arguments,
        **({'classes': model.num_classes} if is_classifier else {}),
        'parameters': f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M',
        **_features(model),
        'input': ' x '.join(map(str, data_config.get('input_size', ()))),
        'crop, interpolation': f'{data_config.get("crop_pct")}, {data_config.get("interpolation")}',
        'mean, std': f'{data_config.get("mean")}, {data_config.get("std")}',
    }
    text = (
        f'# {name}\n\n{_kind(trained)}\n\n'
        + _table('Model', about)
        + ('## Usage\n\n' if head is None else '## Usage\n\nWith timm_bilinear installed:\n\n')
        + _usage(model, repo_id, is_classifier)
        + '\n\n'
        + _table('Results', metrics)
        + _table('Training', dict({'dataset': dataset} if dataset else {}, **args))
        + ('' if head is None else f'## Citation\n\n{_CITATION}\n')
    )
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}')
