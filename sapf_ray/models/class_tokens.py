"""Class tokens: what a class's condition is learned to be, beside what its words say.

A class whose words the public text encoder does not know cannot be told to the denoiser by LoRA
factors alone: they learn the style that all images share. So the condition of class c becomes

    base_c + w t_c        base_c: the public condition, fixed;  t_c: learned, zero at first

For text models base and tokens are all (L, d) states of the prompt; for models with label ids the
tokens (d,) are added to the embedding of the class's label in every block. The empty prompt, or the
label that stands for none, stays what it is. The weight w, a public number, scales the gradient
with respect to t, and so says how much of a record's clipped gradient is the tokens'. (Textual
inversion, Gal et al. 2023, learns the text encoder's *input* instead, through which every gradient
would have to be propagated.)

A class belongs to a record, so the gradient of a record's own loss with respect to its own
condition is its per-sample gradient, and moves one class's tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapf_ray.errors import DataError, reason
from sapf_ray.models.conditioning import denoiser_of
from sapf_ray.models.conditions import Conditions

CLASS_TOKENS = "class_tokens.safetensors"
NAME = "class_tokens"
TOKENS = f"{NAME}.values"
"""Name of the trained parameter in the denoiser."""


class ClassTokens(nn.Module):
    """The tokens of all classes, and how one batch of records uses them.

    :meth:`add_to` makes it a part of the denoiser, so that its values are copied, kept and resumed
    by name like all others.

    Args:
        shape: (classes, L, d), or (classes, d) for a model with label ids.
        weight: w, above 0.

    Attributes:
        values: What is trained, float32, zero at first.
    """

    def __init__(self, shape: Sequence[int], weight: float = 1.0) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(tuple(shape)))
        self.weight = weight
        self._rows: Tensor | None = None  # the batch's own tokens, a leaf
        self.labels: Tensor | None = None  # (n,) the batch's classes

    @classmethod
    def add_to(cls, denoiser: Any, conditions: Conditions, *, weight: float = 1.0) -> ClassTokens:
        """Adds tokens for all classes to the denoiser, as its last part.

        Args:
            denoiser: A U-Net, or a transformer with label ids.
            conditions: Public condition of each class.
            weight: w.
        """
        if conditions.states is not None:
            tokens = cls(conditions.states.shape, weight)
        else:
            embedders = label_embedders(denoiser)
            tokens = cls((len(conditions), embedders[0].weight.shape[1]), weight)
            for embedder in embedders:
                embedder.register_forward_hook(tokens._shift_embedding)
        denoiser.add_module(NAME, tokens)
        return tokens

    def shift(self, conditions: Conditions, labels: Tensor) -> Conditions:
        """The conditions of a batch, with their classes' offsets w t.

        The rows of the batch are taken out of the tokens, and are what the next backward pass
        leaves its gradient with: :meth:`grad_sample`.

        Args:
            conditions: Public conditions of the n records, on the denoiser's device.
            labels: (n,) int64 classes of the records.

        Returns:
            Conditions with other states; label ids stay what they are, their embeddings move.
        """
        self.labels = labels.to(self.values.device)
        self._rows = self.values.detach()[self.labels].requires_grad_(True)
        states = conditions.states
        if states is None:
            return conditions
        shifted = (states.float() + self.weight * self._rows).to(states.dtype)
        return conditions.with_parts(states=shifted)

    def grad_sample(self, n: int) -> Tensor:
        """(n, values of a class) float32: the first n records' gradients of the last backward pass.

        Raises:
            RuntimeError: No batch was shifted since, or its loss does not depend on conditions.
        """
        if self._rows is None or self._rows.grad is None:
            raise RuntimeError("no gradient reached the records' conditions")
        gradient = self._rows.grad[:n].flatten(1)
        self._rows = None
        return gradient

    def _shift_embedding(self, embedder: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Adds the batch's rows to embeddings of its labels; several rows may be one record's."""
        if self._rows is None:
            raise RuntimeError("the batch's classes are not known: shift() comes first")
        rows = self._rows.repeat_interleave(len(output) // len(self._rows), dim=0)
        return (output.float() + self.weight * rows).to(output.dtype)


def label_embedders(denoiser: Any) -> list[nn.Embedding]:
    """The tables that turn label ids into vectors; diffusers' DiT has one in each block."""
    found = [
        module.embedding_table
        for module in denoiser.modules()
        if isinstance(getattr(module, "embedding_table", None), nn.Embedding)
    ]
    if not found:
        raise ValueError(f"{type(denoiser).__name__} has no table of label embeddings")
    return found


def save_class_tokens(
    directory: Path, offsets: Tensor, *, conditions: Conditions, class_names: Sequence[str]
) -> None:
    """Writes :data:`CLASS_TOKENS` beside an adapter, so that stock diffusers can use it.

    Text models: ``prompt_embeds`` (classes, L, d), base and offset together, as
    ``pipe(prompt_embeds=...)`` takes one, and ``offsets``; to be passed with it
    ``pooled_prompt_embeds`` (SDXL, SD3, FLUX) or ``prompt_attention_mask`` (PixArt, Sana). Models
    with label ids: ``offsets`` (classes, d) and ``class_labels`` (classes,), the rows of every
    label table that they belong to.
    Metadata: ``class_names``, a JSON list in the order of the rows.
    """
    offsets = offsets.detach().cpu().float().contiguous()
    content = {"offsets": offsets}
    if conditions.states is not None:
        content["prompt_embeds"] = (conditions.states.float() + offsets).contiguous()
    if conditions.pooled is not None:
        content["pooled_prompt_embeds"] = conditions.pooled.float().contiguous()
    if conditions.mask is not None:
        content["prompt_attention_mask"] = conditions.mask.long().contiguous()
    if conditions.labels is not None:
        content["class_labels"] = conditions.labels.contiguous()
    names = json.dumps(list(class_names), ensure_ascii=False)
    metadata = {"format": "pt", "class_names": names}
    save_file(content, directory / CLASS_TOKENS, metadata=metadata)


@torch.no_grad()
def with_class_tokens(pipe: Any, conditions: Conditions, directory: Path | None) -> Conditions:
    """Conditions of the classes with what an adapter's folder says of them.

    Args:
        pipe: The pipeline. Label tables of a model with label ids are changed.
        conditions: Public condition of each class.
        directory: The adapter, or None.

    Returns:
        The very ones given where the folder has no class tokens.

    Raises:
        DataError: The file is damaged or belongs to another model or to other classes.
    """
    if directory is None or not (path := directory / CLASS_TOKENS).exists():
        return conditions
    try:
        saved = load_file(path)
        offsets = saved["offsets"]
        if conditions.states is not None:
            _check(offsets.shape == conditions.states.shape)
            return conditions.with_parts(states=conditions.states + offsets)
        labels = conditions.labels
        assert labels is not None
        _check(torch.equal(saved["class_labels"], labels))
        for embedder in label_embedders(denoiser_of(pipe)):
            weight = embedder.weight
            _check(offsets.shape == (len(labels), weight.shape[1]))
            moved = weight[labels].float() + offsets.to(weight.device)
            weight[labels.to(weight.device)] = moved.to(weight.dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be loaded as class tokens of this model and these classes "
            f"({reason(error)})"
        ) from error
    return conditions


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError("another shape or other labels")
