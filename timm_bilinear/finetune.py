"""Where `timm_bilinear.tools.finetune` was before; its public names stay."""

from .tools.finetune import Interrupted, Stage, default_stages, evaluate, finetune, resolve_amp_dtype

__all__ = ['Interrupted', 'Stage', 'default_stages', 'evaluate', 'finetune', 'resolve_amp_dtype']
