"""Fine-tuning on an image folder, in the two stages of B-CNN: the classifier first, then everything.

A short loop around timm's optimizers and schedulers. For several machines, EMA, mixup and the rest there is timm's own
train script, which takes these models too.
"""

from pathlib import Path
from typing import Any, Dict, Optional, Union

from .distributed import init_distributed, shutdown
from .inference import resolve_amp_dtype
from .interrupt import Interrupted, catch_signals
from .lock import only_run
from .session import Session
from .settings import Settings, Stage, default_stages
from .training import evaluate

__all__ = ['Interrupted', 'Stage', 'default_stages', 'evaluate', 'finetune', 'resolve_amp_dtype']


def finetune(
    data_dir: Optional[Union[str, Path]] = None,
    output: Optional[Union[str, Path]] = None,
    **settings: Any,
) -> Dict[str, Any]:
    """Fine-tune a bilinear CNN on an image folder and save the best epoch in the Hub's layout.

    The same arguments give the same weights bit for bit on one machine with as many threads, whatever the number of
    loader processes, also when the run is killed and resumed in between. Best is the highest validation accuracy, of
    equal ones the lowest validation loss, of equal ones the first.

    Args:
        data_dir: Folder with `train`, `val` and optionally `test`, each with a folder per class; or one of class
            folders with `val_fraction`; or the name of a data set as timm's train script takes it ('torch/...'). Images
            are read with as many channels as the model takes: grey, grey and alpha, RGB or RGBA.
        output: Folder for config.json, model.safetensors, args.yaml, summary.csv, results.json, curves.png and
            checkpoints/.
        **settings: As `timm_bilinear.tools.settings.Settings` has them, with their defaults:

            - model: timm model name, with `local-dir:` or `hf-hub:` as for `timm.create_model`. Other models than
              bilinear CNNs train with stages in which nothing is frozen (`head_epochs=0`), for comparison.
            - pretrained: Start from pretrained weights; weights: start from those in this file instead.
            - model_kwargs: Further arguments for `timm.create_model`.
            - img_size: Input height and width in pixels; train_size: of the crops trained on. Pooling is over any
              number of locations: small crops at the scale of whole images train several times as fast.
            - batch_size: Images per step, of all processes together.
            - epochs: Epochs with everything trained; head_epochs: epochs with frozen streams before that, if they start
              from weights; freeze: leave it at those.
            - opt, lr, head_lr, weight_decay: Replace the values of the recipe, see `default_stages`; stages: a list of
              `Stage` replaces the recipe.
            - smoothing: Label smoothing; class_weights: weigh classes by the inverse of their share.
            - patience: End a stage after so many epochs without a better validation result.
            - train_aug: Augmentation by the names of `timm.data.create_transform`: scale, ratio, hflip, vflip,
              color_jitter, auto_augment.
            - amp_dtype: 'auto', 'bfloat16', 'float16' or 'float32' (also None), or torch's dtype; a CPU without the
              instructions trains in float32 anyway.
            - workers: Loader processes; device: device to train on, None for a GPU if there is one.
            - seed: Seed of weights, order and augmentation.
            - val_fraction: Share of the images to validate on, if there is no `val`; skip_bad: go on without the images
              that cannot be read; class_map: file with the order of the classes.
            - data_root, train_split, val_split, test_split, download: Where a named data set is, and what of it.
            - head_cache: GB of features of whole images and their mirror images that may be kept while the streams are
              frozen; 0 for none: images go through the streams in every epoch, augmented.
            - resume: Continue the run in `output`, if there is one, with its arguments. Those that are given again must
              be the same, but for data_dir (the same images elsewhere), workers, device, log_format and tensorboard.
            - overwrite: Replace the run in `output`.
            - log_format: 'bar', 'text' for log files, or 'json'; tensorboard: write event files into `output`.

    Returns:
        Metrics of the saved weights: 'epoch' (from 0), 'val_top1' in percent, 'val_loss' and, if there is a test split,
        'test_top1'.

    Raises:
        FileExistsError: If `output` holds something and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If data are missing, or there is nothing to resume.
        Interrupted: After Ctrl-C or SIGTERM; its message says what is kept and how to go on.
        RuntimeError: If another process writes to `output`, another thread has a run, or the loss became infinite.
        TypeError: If there is no such setting, or one has a wrong type.
        ValueError: If data or settings are wrong, or differ from those of the run that is resumed.
        OSError: If results cannot be written.
    """
    given = {k: v for k, v in dict(data_dir=data_dir, output=output).items() if v is not None}
    checked = Settings.of(dict(settings, **given))
    if checked.output is None:
        raise ValueError("'output' is missing: the folder for the run.")
    with only_run():
        ranks = init_distributed(checked.device)
        try:
            with catch_signals():
                return Session(checked, ranks).run()
        finally:
            shutdown(ranks)
