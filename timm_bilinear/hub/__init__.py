from .push import push_to_hub, save_model

__all__ = ['push_to_hub', 'save_model']
