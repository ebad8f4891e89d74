"""PIL modes of the images that a model takes."""

__all__ = ['IMG_MODES']

# By number of channels.
IMG_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
