from .bcnn import BilinearCNN

__all__ = ['BilinearCNN']
