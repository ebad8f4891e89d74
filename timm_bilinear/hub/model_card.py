"""Model cards of bilinear CNNs, with what the model itself, its training and its metrics say."""

from typing import Any, Dict, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args

from .checkpoint import Trained

__all__ = ['create_card']

_USAGE = """```python
import timm
import timm_bilinear  # registers bilinear CNNs with timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.open('image.jpg').convert('RGB')
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for p, i in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{{names[i]}}: {{100 * p:.1f}} %')

descriptors = model.forward_head(model.forward_features(transform(image).unsqueeze(0)), pre_logits=True)
```"""
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
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'bilinear-cnn'],
        license=license,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
    )
    arguments = {k: v for k, v in get_model_args(model).items() if k != 'num_classes'}
    args = {key: trained.args[key] for key in _TRAINING if trained.args.get(key) not in (None, '', [], {}, False)}
    about = {
        'architecture': model.pretrained_cfg['architecture'],
        **arguments,
        'classes': model.num_classes,
        'parameters': f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M',
        'descriptor': f'{model.head_hidden_size:,} entries of unit length',
        'input': ' x '.join(map(str, data_config.get('input_size', ()))),
        'crop, interpolation': f'{data_config.get("crop_pct")}, {data_config.get("interpolation")}',
        'mean, std': f'{data_config.get("mean")}, {data_config.get("std")}',
    }
    text = (
        f'# {name}\n\nA bilinear CNN ([arXiv 1504.07889](https://arxiv.org/abs/1504.07889)) for timm, trained with'
        ' timm_bilinear.\n\n'
        + _table('Model', about)
        + '## Usage\n\nWith timm_bilinear installed:\n\n'
        + _USAGE.format(repo_id=repo_id)
        + '\n\n'
        + _table('Results', metrics)
        + _table('Training', dict({'dataset': dataset} if dataset else {}, **args))
        + f'## Citation\n\n{_CITATION}\n'
    )
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}')
