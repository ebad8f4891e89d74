"""Where a run is: what a checkpoint holds, and which epoch is the best so far."""

import time
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import nn

from .frozen import FrozenStage
from .run import best_epoch
from .training import ImageStage

__all__ = ['RunState']


class RunState:
    """History of a run, its best weights, and the checkpoint of both.

    Args:
        net: The model that is trained.
        facts: What is the same in every checkpoint of the run.
        checkpoint: The checkpoint of a run that goes on.
    """

    def __init__(self, net: nn.Module, facts: Dict[str, Any], checkpoint: Optional[Dict[str, Any]] = None):
        self.net, self.facts = net, facts
        self.history: List[Dict[str, Any]] = []
        self.best_state: Dict[str, torch.Tensor] = {}
        self.best_snapshot: Optional[Tuple[torch.Tensor, ...]] = None  # of a best epoch that is in no checkpoint yet
        self.saved_at = time.monotonic()
        if checkpoint is not None:
            self.history = list(checkpoint['history'])
            best_state = checkpoint['best']['state_dict']
            self.best_state = checkpoint['state_dict'] if best_state is None else best_state

    def _weights(self, copied: bool = False) -> Dict[str, torch.Tensor]:
        state = {k: v.detach().cpu() for k, v in self.net.state_dict().items()}
        return {k: v.clone() for k, v in state.items()} if copied else state

    def add(self, row: Dict[str, Any], trainer: Union[ImageStage, FrozenStage]) -> None:
        """Add the row of an epoch that is over."""
        self.history.append(row)
        if best_epoch(self.history) == len(self.history) - 1:
            self.best_snapshot = trainer.snapshot()

    def is_due(self, trainer: Union[ImageStage, FrozenStage], is_over: bool) -> bool:
        """Whether a checkpoint is to be written; at the end of a stage it is."""
        return is_over or time.monotonic() - self.saved_at >= trainer.save_interval

    def checkpoint(self, trainer: Union[ImageStage, FrozenStage]) -> Dict[str, Any]:
        """All that a resumed run needs, and who wants the model: after the last epoch that was added."""
        best, last = best_epoch(self.history), len(self.history) - 1
        if self.best_snapshot is not None and best != last:
            trainer.write_classifier(self.best_snapshot)
            self.best_state = self._weights(copied=True)
        trainer.write_classifier()
        if best == last:
            self.best_state = self._weights(copied=True)
        self.best_snapshot, self.saved_at = None, time.monotonic()
        row = self.history[best]
        return dict(
            self.facts,
            epoch=last,
            state_dict=self._weights(),
            optimizer=trainer.state_dict(),
            history=list(self.history),
            best=dict(
                epoch=best,
                metrics=dict(val_top1=row['eval_top1'], val_loss=row['eval_loss']),
                state_dict=None if best == last else self.best_state,
            ),
        )

    def best_metrics(self) -> Dict[str, Any]:
        best = best_epoch(self.history)
        row = self.history[best]
        return dict(epoch=best, val_top1=row['eval_top1'], val_loss=row['eval_loss'])
