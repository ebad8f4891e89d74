from .exact import AvgPooling, ExactPooling, MaxPooling, SumPooling
from .registry import BilinearPooling, check_pooling, create_pooling, list_poolings, pooling_arguments, register_pooling

__all__ = [
    'AvgPooling',
    'BilinearPooling',
    'ExactPooling',
    'MaxPooling',
    'SumPooling',
    'check_pooling',
    'create_pooling',
    'list_poolings',
    'pooling_arguments',
    'register_pooling',
]
