"""Fine-tuning on an image folder, in the two stages of B-CNN: the classifier first, then everything.

A short loop around timm's loaders, optimizers, schedulers and checkpoint saver. For distributed training, EMA, mixup
and the rest there is timm's own train script, which takes these models too.
"""

import argparse
import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_loader, resolve_input_data_config
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn
from tqdm import tqdm

from .._compat import mkldnn_has_bfloat16
from ..data.folder import create_datasets
from ..hub import save_model
from ..hub.model_card import IMG_MODES
from ..models import BilinearCNN

__all__ = ['Stage', 'default_stages', 'evaluate', 'finetune', 'resolve_amp_dtype']

_logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """A part of training with an optimizer and a schedule of its own.

    Args:
        epochs: Length.
        opt: timm optimizer name.
        lr: Peak learning rate of the streams; 0 keeps them frozen.
        head_lr: Peak learning rate of the head, whose unit-length descriptors want a higher one.
        weight_decay: Weight decay of the streams' weight matrices; the head has none.
    """

    epochs: int
    opt: str
    lr: float
    head_lr: float
    weight_decay: float


def default_stages(from_weights: bool, epochs: int, head_epochs: int) -> List[Stage]:
    """Recipe: two stages if the streams start from weights, one if they start from nothing.

    The learning rates from weights follow the paper: 1.0 for the classifier alone, then 1e-3 for the streams.
    """
    if not from_weights:
        return [Stage(epochs, 'adamw', lr=1e-3, head_lr=1e-2, weight_decay=0.05)]
    stages = [Stage(head_epochs, 'sgd', lr=0.0, head_lr=1.0, weight_decay=0.0)]
    stages += [Stage(epochs, 'sgd', lr=1e-3, head_lr=1e-2, weight_decay=1e-5)]
    return [stage for stage in stages if stage.epochs > 0]


def _create_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    of_head = set((model.head if isinstance(model, BilinearCNN) else model.get_classifier()).parameters())
    head, decay, no_decay = [], [], []
    for param in model.parameters():
        if not param.requires_grad:
            continue
        group = head if param in of_head else decay if param.ndim > 1 else no_decay
        group.append(param)
    groups = [
        dict(params=head, lr=stage.head_lr, weight_decay=0.0),
        dict(params=decay, lr=stage.lr, weight_decay=stage.weight_decay),
        dict(params=no_decay, lr=stage.lr, weight_decay=0.0),
    ]
    return create_optimizer_v2([group for group in groups if group['params']], opt=stage.opt, lr=stage.lr)


def resolve_amp_dtype(name: Optional[str], device: torch.device) -> Optional[torch.dtype]:
    """Dtype to autocast to, from its name.

    Returns:
        None for float32: without a name, and for bfloat16 on a CPU where oneDNN does not support it. It would be
        emulated there, at a thirteenth of float32's speed (bcnn_resnet18 to stage 3 with AVX2: 4 against 51 images/s).
    """
    if name == 'bfloat16' and device.type == 'cpu' and not mkldnn_has_bfloat16():
        _logger.warning('This CPU has no bfloat16 convolutions: going on in float32.')
        return None
    return None if name is None else getattr(torch, name)


def _autocast(device: torch.device, amp_dtype: Optional[torch.dtype]):
    return nullcontext() if amp_dtype is None else torch.autocast(device.type, dtype=amp_dtype)


def _batches(loader, desc: str, device: torch.device) -> Iterator[Tuple[tqdm, torch.Tensor, torch.Tensor]]:
    with tqdm(loader, desc=desc, unit='batch', leave=False) as bar:
        for images, targets in bar:
            yield bar, images.to(device, memory_format=torch.channels_last), targets.to(device)


def _train_epoch(
    model: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    scheduler,
    updates: int,
    device: torch.device,
    amp_dtype: Optional[torch.dtype],
    smoothing: float,
    desc: str,
) -> Dict[str, float]:
    model.train()
    losses, top1 = AverageMeter(), AverageMeter()
    for bar, images, targets in _batches(loader, desc, device):
        scheduler.step_update(updates)
        updates += 1
        with _autocast(device, amp_dtype):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if not loss.isfinite():
            raise RuntimeError(f'The loss became {loss.item()} in {desc}; a lower learning rate may help.')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(targets))
        top1.update(accuracy(logits, targets)[0].item(), len(targets))
        bar.set_postfix(loss=f'{losses.avg:.3f}', top1=f'{top1.avg:.1f}')
    return {'loss': losses.avg, 'top1': top1.avg}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader,
    device: torch.device,
    amp_dtype: Optional[torch.dtype] = None,
    desc: str = 'Evaluating',
) -> Dict[str, float]:
    """Loss and top-1 accuracy, in percent, of a model on a timm loader."""
    model.eval()
    losses, top1 = AverageMeter(), AverageMeter()
    for _, images, targets in _batches(loader, desc, device):
        with _autocast(device, amp_dtype):
            logits = model(images).float()
        losses.update(F.cross_entropy(logits, targets).item(), len(targets))
        top1.update(accuracy(logits, targets)[0].item(), len(targets))
    return {'loss': losses.avg, 'top1': top1.avg}


def _create_loaders(
    datasets,
    data_config: dict,
    train_size: Optional[int],
    batch_size: int,
    workers: int,
    device: torch.device,
    train_aug: dict,
) -> dict:
    common = dict(
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        use_prefetcher=device.type == 'cuda',
        pin_memory=device.type == 'cuda',
        persistent_workers=False,  # workers are seeded anew each epoch, which is what makes a resumed run the same
        **{k: data_config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
    )
    loaders = {split: create_loader(ds, **common) for split, ds in datasets.items() if split != 'train'}
    if train_size:
        common['input_size'] = (data_config['input_size'][0], train_size, train_size)
    common['batch_size'] = min(batch_size, len(datasets['train']))  # the last, smaller batch is dropped
    loaders['train'] = create_loader(datasets['train'], is_training=True, **common, **train_aug)
    return loaders


def finetune(
    data_dir: Union[str, Path],
    output: Union[str, Path],
    model: str = 'bcnn_resnet18',
    pretrained: bool = True,
    model_kwargs: Optional[Dict[str, Any]] = None,
    img_size: Optional[int] = None,
    train_size: Optional[int] = None,
    batch_size: int = 32,
    epochs: int = 30,
    head_epochs: int = 30,
    stages: Optional[List[Stage]] = None,
    smoothing: float = 0.1,
    train_aug: Optional[Dict[str, Any]] = None,
    amp_dtype: Optional[str] = None,
    workers: int = 2,
    device: Optional[str] = None,
    seed: int = 42,
    resume: bool = False,
) -> Dict[str, float]:
    """Fine-tune a bilinear CNN on an image folder and save the best epoch in the Hub's layout.

    The same arguments give the same weights bit for bit on one machine, also when the run is resumed in between.

    Args:
        data_dir: Folder with `train`, `val` and optionally `test`, each with a folder per class. Images are read
            with as many channels as the model takes: grey, grey and alpha, RGB or RGBA.
        output: Folder for config.json, model.safetensors, args.yaml, summary.csv, results.json and checkpoints/.
        model: timm model name, with `local-dir:` or `hf-hub:` as for `timm.create_model`. Other models than bilinear
            CNNs train with `stages` in which nothing is frozen, for comparison.
        pretrained: Start from weights.
        model_kwargs: Further arguments for `timm.create_model`.
        img_size: Input height and width in pixels, the model's own if None.
        train_size: Height and width of the crops trained on, `img_size` if None. Pooling is over any number of
            locations: small crops at the scale of whole images train several times as fast.
        batch_size: Images per step.
        epochs: Epochs with everything trained.
        head_epochs: Epochs with frozen streams before that, if they start from weights.
        stages: Replaces the default recipe, `epochs` and `head_epochs`.
        smoothing: Label smoothing.
        train_aug: Augmentation arguments for `timm.data.create_loader`.
        amp_dtype: 'bfloat16' for autocast, None for float32, which a CPU without bfloat16 instructions takes anyway.
        workers: Loader processes.
        device: Device to train on; None for a GPU if there is one.
        seed: Seed of weights, order and augmentation.
        resume: Continue the run in `output`. One that was cut off in its first epoch starts anew, with or without.

    Returns:
        Metrics of the saved weights: 'epoch', 'val_top1' and, if there is a test split, 'test_top1', in percent.

    Raises:
        FileExistsError: If `output` holds a run and `resume` is not set.
        FileNotFoundError: If data are missing, or there is nothing to resume.
        ValueError: If data or arguments are wrong.
        OSError: If results cannot be written.
    """
    output = Path(output)
    checkpoints = output / 'checkpoints'
    last = checkpoints / 'last.pth.tar'
    present = {p.name for p in output.iterdir()} if output.exists() else set()
    # cut off before its first checkpoint: there is nothing to lose, and nothing to continue
    unsaved = {'args.yaml'} <= present <= {'args.yaml', 'checkpoints'}
    unsaved = unsaved and {p.name for p in checkpoints.glob('*')} <= {'tmp.pth.tar'}
    if resume and not unsaved and not last.is_file():
        raise FileNotFoundError(f"Nothing to resume: '{last}' does not exist.")
    if not resume and not unsaved and present:
        raise FileExistsError(f"'{output}' is not empty; use resume to continue its run, or another folder.")
    resume = resume and not unsaved
    datasets = create_datasets(data_dir)
    label_names = list(datasets['train'].reader.class_to_idx)

    random_seed(seed)
    net = timm.create_model(model, pretrained=pretrained, num_classes=len(label_names), **(model_kwargs or {}))
    stages = stages or default_stages(pretrained, epochs, head_epochs)
    if not isinstance(net, BilinearCNN) and any(stage.lr == 0.0 for stage in stages):
        raise ValueError(f"'model' must be a bilinear CNN for a stage with frozen streams, got {model!r}.")
    torch_device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    net.to(device=torch_device, memory_format=torch.channels_last)
    data_config = resolve_input_data_config(net, dict(img_size=img_size))
    in_chans = data_config['input_size'][0]
    if in_chans not in IMG_MODES:
        raise ValueError(f'Images have 1 to {max(IMG_MODES)} channels, the model wants {in_chans}.')
    for dataset in datasets.values():
        dataset.input_img_mode = IMG_MODES[in_chans]
    loaders = _create_loaders(datasets, data_config, train_size, batch_size, workers, torch_device, train_aug or {})
    amp = resolve_amp_dtype(amp_dtype, torch_device)

    checkpoints.mkdir(parents=True, exist_ok=True)
    told = dict(
        data_dir=str(data_dir),
        model=model,
        pretrained=pretrained,
        model_kwargs=model_kwargs,
        img_size=img_size,
        train_size=train_size,
    )
    # what is trained in, not what was asked for: it goes into the model card
    told.update(amp_dtype=None if amp is None else amp_dtype)
    told.update(batch_size=batch_size, smoothing=smoothing, seed=seed, **(train_aug or {}))
    told.update(stages=[vars(stage) for stage in stages])
    (output / 'args.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(told))))
    start = load_checkpoint_metadata(str(last))['epoch'] + 1 if resume else 0
    saver: Optional[CheckpointSaver] = None
    end = 0
    for number, stage in enumerate(stages, 1):
        first, end = end, end + stage.epochs
        if start >= end and stage is not stages[-1]:
            continue
        if isinstance(net, BilinearCNN):
            net.set_freeze_backbone(stage.lr == 0.0)
        optimizer = _create_optimizer(net, stage)
        if saver is None:
            saver = CheckpointSaver(
                net, optimizer, argparse.Namespace(model=model), checkpoint_dir=str(checkpoints), max_history=1
            )
            if resume:
                # a checkpoint of the end of the stage before has weights for this one, but no optimizer state
                resume_checkpoint(net, str(last), optimizer if start > first else None, log_info=False)
                saver.load_state_dict_from_checkpoint(str(last))
        saver.optimizer = optimizer
        steps = len(loaders['train'])
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=stage.epochs,
            warmup_epochs=1 if stage.epochs > 4 else 0,
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        for epoch in range(max(first, start), end):
            random_seed(seed, epoch + 1)  # order and augmentation depend on the epoch alone
            desc = f'Stage {number}/{len(stages)}, epoch {epoch - first + 1}/{stage.epochs}'
            updates = (epoch - first) * steps
            train = _train_epoch(
                net, loaders['train'], optimizer, scheduler, updates, torch_device, amp, smoothing, desc
            )
            val = evaluate(net, loaders['val'], torch_device, amp)
            saver.save_checkpoint(epoch, val['top1'])
            update_summary(epoch, train, val, output / 'summary.csv', lr=optimizer.param_groups[0]['lr'])
            print(f'{desc}: loss {train["loss"]:.3f}, top-1 {train["top1"]:.1f} %, val top-1 {val["top1"]:.2f} %')

    load_checkpoint(net, str(checkpoints / 'model_best.pth.tar'))
    save_model(net, output, label_names, data_config)
    metrics = {'epoch': saver.best_epoch, 'val_top1': saver.best_metric}
    if 'test' in loaders:
        metrics['test_top1'] = evaluate(net, loaders['test'], torch_device, amp)['top1']
    (output / 'results.json').write_text(json.dumps(metrics) + '\n')
    return metrics
