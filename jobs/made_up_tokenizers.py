"""Tokenizers with made-up vocabularies, for models whose own cannot be fetched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sapf_ray.models.vocabulary import known_prompts

VOCABULARY = 49_408  # of CLIP
MAX_TOKENS = 77


def clip_tokenizer(size: int = VOCABULARY, length: int = MAX_TOKENS) -> transformers.CLIPTokenizer:
    """CLIP's lower-casing byte-level BPE with a made-up vocabulary of the published size.

    The words that ``sapf`` knows are a token each; the rest are pairs and triples of bytes.

    Args:
        size: Number of tokens, the two that begin and end a text among them.
        length: Tokens of a prompt.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = dict.fromkeys(merge for word in _known_words() for merge in _merges_of(word))
    tokens = dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet)])
    tokens |= dict.fromkeys(first + second for first, second in merges)
    for first, second in itertools.product(alphabet, alphabet):
        if len(tokens) == size - 2:
            break
        merges[first, second] = None
        tokens[first + second] = None
    # last, as in CLIP: the encoder pools at the largest id
    names = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=list(merges),
        model_max_length=length,
    )


def word_tokenizer(
    words: Sequence[str] = (), length: int = 512
) -> transformers.PreTrainedTokenizerFast:
    """One token a word, with an end, and padding on the right: in place of T5's and Gemma's.

    Args:
        words: That have a token each; those that ``sapf`` knows by default.
        length: Tokens of a prompt.
    """
    names = ["<pad>", "</s>", "<unk>", *dict.fromkeys(words or _known_words())]
    numbers = {name: number for number, name in enumerate(names)}
    end = [("</s>", numbers["</s>"])]
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=end)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def _known_words() -> list[str]:
    words = " ".join(known_prompts("any")).lower().split()
    return [word for word in dict.fromkeys(words) if word.isascii() and word.isalpha()]


def _merges_of(word: str) -> list[tuple[str, str]]:
    """Merges by which a word becomes one token, letter by letter."""
    letters = [*word[:-1], word[-1] + "</w>"]
    wholes = itertools.accumulate(letters)
    return list(zip(wholes, letters[1:], strict=False))
