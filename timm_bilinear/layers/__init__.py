from .bilinear_head import BilinearHead

__all__ = ['BilinearHead']
