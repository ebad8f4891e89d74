from .head import BilinearHead
from .pooling import BilinearPooling, create_pooling, list_poolings, register_pooling

__all__ = ['BilinearHead', 'BilinearPooling', 'create_pooling', 'list_poolings', 'register_pooling']
