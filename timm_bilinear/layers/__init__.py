from .head import BilinearHead

__all__ = ['BilinearHead']
