from .path import backward, classify, classify_backward, forward

__all__ = ['backward', 'classify', 'classify_backward', 'forward']
