"""The app command: a page, by Gradio, that a picture is dropped on."""

import os
import tempfile
from pathlib import Path
from typing import Any, List, Optional, Union

from .looker import Looker

__all__ = ['create_app', 'run_app']

_LOOPBACK = '127.0.0.1'
_MAX_EXAMPLES = 6
_NO_CONTRAST = -1  # of the dropdown, where Gradio has another meaning for None
_MAX_FILE = '64mb'
_KEPT_SECONDS = 600  # of uploads and of what was drawn, which the page shows; all are gone when it ends
_PICTURES = ('.png', '.jpg', '.jpeg', '.webp')


def _gradio() -> Any:
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError:
        raise ModuleNotFoundError("Gradio is not installed: pip install 'timm_bilinear[app]'") from None
    return gradio


def _examples(model: Any) -> List[str]:
    """Pictures in the folder `examples` of a model's folder."""
    folder = Path(str(model).removeprefix('local-dir:')) / 'examples'
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES) if folder.is_dir() else []
    return [str(p) for p in files[:_MAX_EXAMPLES]]


def create_app(looker: Looker, examples: Optional[List[str]] = None) -> Any:
    """The page.

    Args:
        looker: What says something of pictures.
        examples: Files of pictures to click on.

    Returns:
        A `gradio.Blocks`, which its `launch` shows.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
    """
    gr = _gradio()
    has_index = looker.index is not None

    def look(picture: Optional[str], contrast: Optional[int]):
        sight = looker.look(picture, None if contrast == _NO_CONTRAST else contrast)
        outputs = [sight.sentence, sight.probabilities or None, sight.evidence]
        return [*outputs, sight.found] if has_index else outputs

    title = f'{looker.name}: {len(looker.names):,} classes'
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS)) as app:
        gr.Markdown(f'# {looker.name}\nOne of {len(looker.names):,} classes, and what in the picture speaks for it.')
        with gr.Row():
            with gr.Column():
                picture = gr.Image(type='filepath', sources=['upload', 'clipboard'], label='Picture', image_mode=None)
                # Gradio would open it, and fail with an error of its own where that is not possible
                picture.preprocess = lambda payload: None if payload is None else payload.path
                # indices, for what a class is called may be what another one's label is
                classes = [('', _NO_CONTRAST), *((name, i) for i, name in enumerate(looker.names))]
                contrast = gr.Dropdown(classes, value=_NO_CONTRAST, label='Rather than', filterable=True)
                if examples:
                    gr.Examples(examples, picture)
            with gr.Column():
                sentence = gr.Markdown(looker.look(None).sentence, elem_id='sentence')
                probabilities = gr.Label(label='Classes', num_top_classes=5)
        evidence = gr.Image(label='Evidence', type='pil', format='png', interactive=False)
        outputs = [sentence, probabilities, evidence]
        if has_index:
            outputs.append(gr.Gallery(label='Look-alikes', columns=5, object_fit='contain', format='png'))
        for changed in (picture.change, contrast.change):
            changed(look, [picture, contrast], outputs, show_progress='minimal')
    return app


def run_app(
    model: str,
    index: Optional[str] = None,
    port: Optional[int] = None,
    host: Optional[str] = None,
    device: Optional[str] = None,
    examples: Union[List[str], None] = None,
) -> int:
    """The command: show the page until it is stopped.

    Args:
        model: As for `predict`.
        index: Index of images to find look-alikes in.
        port: Port; None for the first free one from 7860.
        host: Address to listen on; None for GRADIO_SERVER_NAME of the environment, else this machine alone.
        device: As for `predict`.
        examples: Pictures to click on; None for those in the folder `examples` of the model's folder.

    Returns:
        Exit code 0.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
        OSError: If the port is taken.
    """
    gr = _gradio()
    examples = _examples(model) if examples is None else examples
    with tempfile.TemporaryDirectory(prefix='timm_bilinear_app_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        app = create_app(Looker(model, index, device), examples)
        app.launch(
            server_name=host or os.environ.get('GRADIO_SERVER_NAME') or _LOOPBACK,
            server_port=port,
            share=False,
            max_file_size=_MAX_FILE,
            ssr_mode=False,
            theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
            allowed_paths=examples,
        )
    return 0
