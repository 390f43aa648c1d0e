"""Turn a checkpoint, or a model in another format, into a model folder in Hugging Face format."""

from __future__ import annotations

from typing import Optional


def export(
    checkpoint: str,
    *,
    output: str,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint into a model folder in Hugging Face format, on one CPU, a tensor at a time.

    Args:
        checkpoint: file or folder that a run wrote, with any strategy and any number of devices;
            or a model to copy: a GGUF file, a folder of an adapter, a hub id.
        output: folder to write (-o).
        model: where the run's base model is; needed only if it has moved.
        mask: where the run's mask is; needed only if it has moved.
        overwrite: replace an existing model folder; a folder of other things is left alone.
    """
    from wagle_pl.unlearning.export import export as write

    print(f"model written to {write(checkpoint, output, model, mask, overwrite)}")


COMMANDS = export
