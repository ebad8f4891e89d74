from .compact import MaclaurinPooling, SketchPooling
from .covariance import ISqrtPooling, MatrixRootPooling
from .cross import CrossPooling
from .democratic import DemocraticPooling
from .exact import AvgPooling, ExactPooling, MaxPooling, SumPooling
from .lowrank import LowRankClassifier, LowRankPooling
from .moments import MomentsPooling
from .registry import (
    BilinearPooling,
    Terms,
    check_pooling,
    check_takes_levels,
    create_pooling,
    list_poolings,
    most_streams,
    pooling_arguments,
    register_pooling,
)

__all__ = [
    'AvgPooling',
    'BilinearPooling',
    'CrossPooling',
    'DemocraticPooling',
    'ExactPooling',
    'ISqrtPooling',
    'LowRankClassifier',
    'LowRankPooling',
    'MaclaurinPooling',
    'MatrixRootPooling',
    'MaxPooling',
    'MomentsPooling',
    'SketchPooling',
    'SumPooling',
    'Terms',
    'check_pooling',
    'check_takes_levels',
    'create_pooling',
    'list_poolings',
    'most_streams',
    'pooling_arguments',
    'register_pooling',
]
