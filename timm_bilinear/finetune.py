"""Where `timm_bilinear.tools.finetune` was before; its public names stay."""

from .tools.finetune import Stage, default_stages, evaluate, finetune, resolve_amp_dtype

__all__ = ['Stage', 'default_stages', 'evaluate', 'finetune', 'resolve_amp_dtype']
