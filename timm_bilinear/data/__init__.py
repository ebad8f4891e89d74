from .folder import create_datasets
from .prepare import prepare

__all__ = ['create_datasets', 'prepare']
