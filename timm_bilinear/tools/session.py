"""One run of `finetune`, from the checks to the results, as one of the processes that train together."""

import copy
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, TypeVar, Union

import torch
from timm.data import resolve_input_data_config
from timm.utils import random_seed

from ..data.folder import create_datasets
from ..data.loader import create_loader
from ..hub import save_model
from ..models import BilinearCNN
from ..models.image_modes import IMG_MODES
from . import remedies
from .distributed import Ranks, broadcast
from .frozen import FrozenStage
from .inference import resolve_amp_dtype
from .interrupt import Interrupted, Terminated
from .network import check_network, create_network, describe_network, rebuild_network, try_out
from .progress import RunLog, check_tensorboard, format_seconds
from .resume import check_data, check_machine, dtype_name, resume_settings
from .run import TRIAL, RunFolder, best_epoch, check_place
from .settings import Settings, Stage
from .stages import create_stage, describe_stage, is_frozen
from .start import count_images, describe_machine, say_start
from .state import RunState
from .training import ImageStage, check_augmentation, check_optimizers, class_weights, evaluate

__all__ = ['Session']

_Result = TypeVar('_Result')


class Session:
    """A run, new or resumed.

    Args:
        settings: What was given.
        ranks: The processes that train together.
    """

    def __init__(self, settings: Settings, ranks: Ranks):
        self.settings, self.ranks, self.device = settings, ranks, ranks.device
        self.log = RunLog(settings.log_format, is_quiet=not ranks.is_first)
        self.path = Path(settings.output)
        self.folder: Optional[RunFolder] = None  # of the first process alone
        self.checkpoint: Optional[Dict[str, Any]] = None
        self.state: Optional[RunState] = None
        self.place = 'The start'  # where the run is, for errors

    @property
    def history(self) -> List[Dict[str, Any]]:
        return [] if self.state is None else self.state.history

    def _first(self, do: Callable[[], _Result]) -> _Result:
        """Do something in the first process; its result, or error, is that of all."""
        if self.ranks.world_size == 1:
            return do()
        result = error = None
        if self.ranks.is_first:
            try:
                result = do()
            except Exception as e:
                error = e
        result, error = broadcast((result, error), self.ranks)
        if error is not None:
            raise error
        return result

    def run(self) -> Dict[str, Any]:
        """Train what is left to train.

        Returns:
            Metrics of the saved weights.

        Raises:
            As `finetune`.
        """
        try:
            self._open()
            self._prepare()
            self._start()
            for number, stage in enumerate(self.stages, 1):
                self._train_stage(number, stage)
            return self._finish()
        except KeyboardInterrupt as e:
            raise Interrupted(self._stopped(), 143 if isinstance(e, Terminated) else 130) from None
        except torch.OutOfMemoryError as e:
            raise RuntimeError(
                f'{self.place}: {self.device} ran out of memory; a smaller --batch-size, --train-size or --img-size'
                ' takes less.'
            ) from e
        finally:
            self.log.close()
            if self.folder is not None:
                self.folder.close()

    def _stopped(self) -> str:
        saved, has_features = len(self.history), False
        if self.folder is not None:
            saved, has_features = self.folder.saved_epochs, self.folder.has_features
        return remedies.stopped(self.settings.output, saved, has_features, self.settings.overwrite)

    def _try(self, do: Callable[[], None], what: str) -> None:
        """Do what writes to the folder before the first epoch; its error names the folder and what to do."""
        try:
            do()
        except OSError as e:
            raise remedies.cannot_write(self.settings.output, what, e) from e

    def _open(self) -> None:
        """The folder, and what the run that is in it says."""
        settings = self.settings

        def open_folder() -> Optional[Dict[str, Any]]:
            check_place(settings.output, settings.data_dir, of_classes=settings.val_fraction is not None)
            self.folder = RunFolder(settings.output, settings.resume, settings.overwrite)
            return self.folder.checkpoint

        self.checkpoint = self._first(open_folder)
        if self.checkpoint is not None:
            self.settings = resume_settings(
                settings, self.checkpoint['args'], self.device, self.checkpoint['data_config']
            )
        elif settings.data_dir is None:
            what = 'no run to resume, and no data are' if settings.resume else 'no run, and no data are'
            raise ValueError(f"'{settings.output}' has {what} given to start one: 'data_dir' is missing.")
        if self.settings.batch_size % self.ranks.world_size:
            raise ValueError(
                f"'batch_size' must be a multiple of the {self.ranks.world_size} processes that share it,"
                f' got {self.settings.batch_size}.'
            )
        self.stages = self.settings.resolve_stages()

    def _prepare(self) -> None:
        """Data and model, checked as far as can be before training."""
        settings = self.settings
        if settings.tensorboard:
            check_tensorboard()
        check_optimizers(self.stages)
        check_augmentation(settings.augmentation())
        if self.checkpoint is None:
            check_network(settings)
        self.data = create_datasets(
            settings.data_dir,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
            skip_bad=settings.skip_bad,
            class_map=settings.class_map,
            root=settings.data_root,
            train_split=settings.train_split,
            val_split=settings.val_split,
            test_split=settings.test_split,
            download=settings.download,
        )
        self.class_names = list(self.data.class_names)
        random_seed(settings.seed)
        if self.checkpoint is not None:
            check_data(self.checkpoint, self.class_names, self.data.fingerprint, settings.data_dir)
            self.net = rebuild_network(self.checkpoint)
            self.network = {k: self.checkpoint[k] for k in ('arch', 'model_args', 'num_classes', 'pretrained_cfg')}
            self.data_config = copy.deepcopy(self.checkpoint['data_config'])
        else:
            self.net, args = create_network(settings, len(self.class_names))
            self.network = describe_network(self.net, args)
            self.data_config = resolve_input_data_config(self.net, dict(img_size=settings.img_size))
        if not isinstance(self.net, BilinearCNN) and any(map(is_frozen, self.stages)):
            raise ValueError(
                f"'model' must be a bilinear CNN for a stage with frozen streams, got {settings.model!r};"
                ' with head_epochs=0 everything is trained at once.'
            )
        in_chans = self.data_config['input_size'][0]
        if in_chans not in IMG_MODES:
            raise ValueError(f'Images have 1 to {max(IMG_MODES)} channels, the model wants {in_chans}.')
        self.net.to(device=self.device, memory_format=torch.channels_last)
        self.amp_dtype = resolve_amp_dtype(settings.amp_dtype, self.device)
        self.class_weights = None
        if settings.class_weights:
            targets = getattr(self.data.splits['train'], 'targets', None)
            if targets is None:
                raise ValueError(
                    f"'class_weights' wants images that can be counted, which '{settings.data_dir}' has not."
                )
            self.class_weights = class_weights(targets, len(self.class_names))
        trial = (self.path / TRIAL, self.class_names, self.data_config, settings.train_size)
        self._first(lambda: self._try(lambda: try_out(self.net, *trial), 'hold the model'))
        self.loaders = {split: self._create_loader(split) for split in ('train', 'val')}

    def _create_loader(self, split: str):
        settings, ranks = self.settings, self.ranks
        training = dict(
            is_training=True,
            train_size=settings.train_size,
            train_aug=settings.augmentation(),
        )
        return create_loader(
            self.data.splits[split],
            self.data_config,
            settings.batch_size,
            workers=settings.workers,
            device=self.device,
            seed=settings.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            **(training if split == 'train' else {}),
        )

    def _start(self) -> None:
        """Say what is going to happen, and begin the run in its folder."""
        settings, machine = self.settings, describe_machine(self.device, self.ranks.world_size)
        notes: List[str] = []
        if self.checkpoint is None:
            self.args = settings.plain()
            for name in ('output', 'resume', 'overwrite'):
                del self.args[name]
            given = sorted(settings.given - {'output', 'resume', 'overwrite'})
            self.args.update(amp_dtype=dtype_name(self.amp_dtype), given=given)
            self.args.update(fingerprint=self.data.fingerprint, images=count_images(self.data), **machine)
            self._first(lambda: self._try(lambda: self.folder.start(self.args), 'be written to'))
        else:
            self.args = self.checkpoint['args']
            notes = check_machine(self.args, machine)
            self._first(lambda: self._write(lambda: self.folder.restore(self.checkpoint)))
        facts = dict(self.network, args=self.args, class_names=self.class_names, data_config=self.data_config)
        self.state = RunState(self.net, facts, self.checkpoint)
        if settings.tensorboard:
            self.log.open_tensorboard(self.path / 'tensorboard', len(self.history))
        say_start(self.log, machine, self.amp_dtype, self.data, settings.model, self.net)
        if any(map(is_frozen, self.stages)) and not settings.from_weights and self.checkpoint is None:
            self.log.say('warning', 'Warning: frozen streams that start from nothing have random features.')
        if notes:
            self.log.say('warning', f'The last digits may differ from a run in one go: {"; ".join(notes)}.')
        if self.history:
            self.log.say('resumed', f'Going on after epoch {len(self.history)}.', epochs=len(self.history))

    def _create_stage(self, stage: Stage, is_resumed: bool) -> Union[ImageStage, FrozenStage]:
        trainer = create_stage(
            self.settings,
            stage,
            self.net,
            self.data,
            self.loaders,
            self.data_config,
            place=self.place,
            checkpoint=self.checkpoint,
            is_resumed=is_resumed,
            first=self._first,
            amp_dtype=self.amp_dtype,
            smoothing=self.settings.smoothing,
            class_weights=self.class_weights,
            log=self.log,
            ranks=self.ranks,
        )
        if isinstance(trainer, ImageStage):
            self._first(lambda: self.folder.remove_features())  # of a run that was cut off, or while it removed them
        return trainer

    def _is_over(self, number: int, stage: Stage) -> bool:
        """Whether a stage has had all its epochs, or so many without a better one that it ends."""
        rows = [row for row in self.history if row['stage'] == number]
        patience = self.settings.patience
        if patience is not None and rows and len(rows) - 1 - best_epoch(rows) >= patience:
            return True
        return len(rows) >= stage.epochs

    def _train_stage(self, number: int, stage: Stage) -> None:
        first = sum(row['stage'] < number for row in self.history)
        done = len(self.history) - first
        if self._is_over(number, stage):
            self._first(lambda: self.folder.remove_features())  # if it was cut off while it did
            return
        self.place = name = f'Stage {number}/{len(self.stages)}'
        trainer = self._create_stage(stage, is_resumed=done > 0)
        if done > 0:
            trainer.load_state_dict(self.checkpoint['optimizer'])
        trained = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        self.log.say(
            'stage',
            f'{name}: {describe_stage(stage, trainer)}',
            stage=number,
            stages=len(self.stages),
            trained=trained,
            features_kept=isinstance(trainer, FrozenStage),
            epochs=stage.epochs,
            steps=trainer.steps,
        )
        seconds: List[float] = []
        while not self._is_over(number, stage):
            done = len(self.history) - first
            self._train_epoch(number, stage, trainer, done, seconds)
        if len(self.history) - first < stage.epochs:
            self.log.say('patience', f'{name}: ends, {self.settings.patience} epochs were no better', stage=number)
        trainer.close()

    def _train_epoch(
        self, number: int, stage: Stage, trainer: Union[ImageStage, FrozenStage], done: int, seconds: List[float]
    ) -> None:
        epoch = len(self.history)
        self.place = desc = f'Stage {number}/{len(self.stages)}, epoch {done + 1}/{stage.epochs}'
        ranks, began = self.ranks, time.monotonic()

        def on_pace(step: float) -> None:
            left = step * trainer.steps * (stage.epochs - done)
            about = 'about ' if left >= 1 else ''
            text = f'{desc}: {step:.2g} s a step, {about}{format_seconds(left)} for the stage without validation'
            self.log.say('pace', text, seconds_per_step=step, seconds_left=left)

        # order, augmentation and dropout depend on the epoch alone, so that a resumed run is the same; processes that
        # have images of their own drop out others of their features, those that all do the same the same
        all_alike = ranks.world_size == 1 or isinstance(trainer, FrozenStage)
        random_seed(self.settings.seed, epoch + 1 if all_alike else (epoch + 1) * ranks.world_size + ranks.rank)
        self.loaders['train'].set_epoch(epoch)
        try:
            train = trainer.train_epoch(done, desc, None if seconds else on_pace)
        except FloatingPointError as e:
            raise RuntimeError(f'{desc}: {e}; {remedies.of_numbers(e, stage, self.amp_dtype)}') from e
        val = trainer.evaluate(f'{desc}, validating')
        seconds.append(time.monotonic() - max(began, trainer.prepared_at))
        row = dict(epoch=epoch, train_loss=train['loss'], train_top1=train['top1'])
        row.update(
            eval_loss=val['loss'], eval_top1=val['top1'], lr=trainer.optimizer.param_groups[0]['lr'], stage=number
        )
        row = broadcast(row, ranks)  # what is decided by it is decided alike, though last digits may differ
        self.state.add(row, trainer)
        self._keep(trainer, self._is_over(number, stage))
        self.log.write_epoch(row)
        left = (stage.epochs - done - 1) * sum(seconds[-5:]) / len(seconds[-5:])
        self.log.say(
            'epoch',
            f'{desc}: loss {train["loss"]:.3f}, top-1 {train["top1"]:.1f} %, val loss {val["loss"]:.3f},'
            f' val top-1 {val["top1"]:.2f} %' + (f', {format_seconds(left)} left' if left else ''),
            seconds=round(seconds[-1], 2),
            seconds_left=round(left, 1),
            **row,
        )

    def _keep(self, trainer: Union[ImageStage, FrozenStage], is_over: bool) -> None:
        """Keep the state after an epoch, in a checkpoint if one is due: at the end of a stage there always is."""
        if not self._first(lambda: self.state.is_due(trainer, is_over)):  # by the clock of one
            return
        checkpoint = self.state.checkpoint(trainer)
        if self.folder is not None:
            self._write(lambda: self.folder.save(checkpoint))

    def _finish(self) -> Dict[str, Any]:
        """Save the best epoch's weights as a model, and what they reach."""
        self.place = 'After the last epoch'
        self.net.load_state_dict(self.state.best_state)
        metrics = self.state.best_metrics()
        if 'test' in self.data.splits:
            loader, progress = self._create_loader('test'), self.log.has_bars
            test = evaluate(self.net, loader, self.device, self.amp_dtype, 'Testing', progress, self.ranks)
            metrics['test_top1'] = test['top1']
        self._first(lambda: self._write(lambda: self._write_results(metrics)))
        return metrics

    def _write(self, write: Callable[[], None]) -> None:
        """Write files; an error says how far the run is, and how to go on."""
        try:
            write()
        except OSError as e:
            remedy = 'make room, then' if remedies.is_full(e) else 'when that is mended,'
            raise OSError(
                f'{self.place}: {str(e).rstrip(".")}. Epochs that are kept: {self.folder.saved_epochs};'
                f' {remedy} `{remedies.resume_command(self.settings.output)}`.'
            ) from e

    def _write_results(self, metrics: Dict[str, Any]) -> None:
        save_model(self.net, self.folder.path, self.class_names, self.data_config)
        self.folder.write_curves(self.history)
        self.folder.write_results(metrics)
