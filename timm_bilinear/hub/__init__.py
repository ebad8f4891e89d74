from .push import push_to_hub
from .save import save_model

__all__ = ['push_to_hub', 'save_model']
