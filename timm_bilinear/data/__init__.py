from .folder import ImageData, ImageList, create_datasets, create_split
from .images import IMG_MODES, ImageError, find_images, open_image
from .loader import create_loader, default_workers, draft_size
from .prepare import prepare

__all__ = [
    'IMG_MODES',
    'ImageData',
    'ImageError',
    'ImageList',
    'create_datasets',
    'create_loader',
    'create_split',
    'default_workers',
    'draft_size',
    'find_images',
    'open_image',
    'prepare',
]
