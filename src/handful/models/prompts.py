"""Prompts: what text encoders make of them, kept, so that the encoders run once a prompt and can then be freed."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition
from handful.errors import RequestError
from handful.models.options import ModelOptions

Embeddings = Mapping[str, Tensor]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LENGTHS = "lengths"  # of embeddings that were filled up with zeros, (n,): their true numbers of tokens
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Prompts:
    """The embeddings of prompts, on the CPU.

    Args:
        encode: Prompts -> embeddings by name, (n, ...) each.
        encode_null: What the network takes as no prompt, (1, ...) each; None where it has none.
        free: Lets the text encoders go; None where nothing can be freed.
        readers: By name, each tokenizer and how many of its tokens the network reads; see `unread`.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Embeddings],
        encode_null: Callable[[], Embeddings] | None = None,
        free: Callable[[], None] | None = None,
        readers: Mapping[str, tuple[Any, int]] | None = None,
    ) -> None:
        self._readers = readers or {}
        self._encode: Callable[[list[str]], Embeddings] | None = encode
        self._encode_null, self._free = encode_null, free
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._null: dict[str, Tensor] | None = None

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Encodes those that are not known yet, one at a time, so that none depends on its neighbours' padding.

        Raises:
            RequestError: If a prompt is not a text, or is new after the encoders were freed.
        """
        for prompt in dict.fromkeys(prompts):
            if not isinstance(prompt, str):
                raise RequestError("prompt", prompt, "this model takes prompts, not labels", "Give a prompt for each image.")
            if prompt in self._kept:
                continue
            encode = self._encode
            if encode is None:
                problem = "the text encoders have been freed from memory, and this prompt was not encoded before"
                remedy = "Encode all prompts first (encode_prompts), or load the model again."
                raise RequestError("prompt", prompt, problem, remedy)
            self._kept[prompt] = {name: each.detach().cpu() for name, each in encode([prompt]).items()}
        if self._null is None and self._encode_null is not None:
            self._null = {name: each.detach().cpu() for name, each in self._encode_null().items()}

    def kept(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of prompts that are known, and of no prompt, for `take`."""
        rows = {str(number): self._kept[prompt] for number, prompt in enumerate(prompts)} | {"null": self._null or {}}
        return {f"{row}.{name}": tensor for row, held in rows.items() for name, tensor in held.items()}

    def take(self, prompts: Sequence[str], kept: Mapping[str, Tensor]) -> None:
        """Knows prompts from now on as `kept` gave them."""
        rows: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in kept.items():
            row, _, name = key.partition(".")
            rows[row][name] = tensor
        self._kept |= {prompt: rows[str(number)] for number, prompt in enumerate(prompts)}
        self._null = rows.get("null")

    def unread(self, prompts: Sequence[str]) -> list[str]:
        """A sentence for each prompt that is longer than a text encoder reads, with the words at its end that are lost."""
        notes = []
        for prompt in dict.fromkeys(prompts):
            lost: dict[str, list[int]] = {}
            for tokenizer, most in self._readers.values():
                words = tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
                beyond = len(words) + tokenizer.num_special_tokens_to_add() - most
                if beyond > 0:
                    lost.setdefault(tokenizer.decode(words[-beyond:]).strip(), []).append(most)
            for text, each in lost.items():
                of = f"{len(each)} of {len(self._readers)} text encoders" if len(self._readers) > 1 else "the text encoder"
                shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
                notes.append(
                    f"the prompt {shown!r} is too long: {of} reads only {each[0]} tokens, and ignores the end {text!r}"
                )
        return notes

    def free(self) -> None:
        """Lets the text encoders go; what is known stays known."""
        if self._free is not None and self._encode is not None:
            self._free()
        self._encode = None

    def condition(self, prompts: Sequence[str], device: torch.device | str) -> Condition:
        """The condition for n prompts."""
        self.remember(prompts)
        if not len(prompts):
            raise RequestError("prompt", list(prompts), "it is empty", "Give a prompt for each image.")
        names = self._kept[prompts[0]]
        if len(set(prompts)) == 1:  # one row, seen n times: no memory for the copies
            joined = {name: names[name].to(device).expand(len(prompts), *names[name].shape[1:]) for name in names}
        else:
            rows = [self._kept[prompt] for prompt in prompts]
            joined = {name: _joined([row[name] for row in rows]).to(device) for name in names}
            lengths = [max((one.shape[1] for one in row.values() if one.ndim > 1), default=0) for row in rows]
            if len(set(lengths)) > 1:
                joined[LENGTHS] = torch.tensor(lengths, device=device)
        null = None if self._null is None else {name: each.to(device) for name, each in self._null.items()}
        return Condition(embeddings=joined, null_embeddings=null)


def _joined(rows: list[Tensor]) -> Tensor:
    """Embeddings (1, tokens, ...) below each other; shorter ones end in zeros."""
    most = max(row.shape[1] for row in rows) if rows[0].ndim > 1 else 0
    short = [row if row.ndim < 2 or row.shape[1] == most else row.new_zeros(1, most, *row.shape[2:]) for row in rows]
    for row, filled in zip(rows, short, strict=True):
        if filled is not row:
            filled[:, : row.shape[1]] = row
    return torch.cat(short)


class Prompted:
    """What denoisers that take prompts share; a base class beside `LatentDenoiser`."""

    prompted = True
    prompts: Prompts

    def encode_prompts(self, prompts: Sequence[str], device: torch.device | str | None = None) -> None:
        """Encodes prompts ahead, so that the text encoders can be freed."""
        if device is not None:
            for name, network in self.components().items():  # type: ignore[attr-defined]
                if name.startswith("text_encoder"):
                    network.to(device)
        self.prompts.remember(prompts)

    def unread(self, prompts: Sequence[str]) -> list[str]:
        """What is lost at the end of prompts that are too long; see `Prompts.unread`."""
        return self.prompts.unread(prompts)

    def free_text_encoders(self) -> None:
        """Lets the text encoders go: a few GB that sampling does not need."""
        self.prompts.free()

    def condition(self, labels: Sequence[str]) -> Condition:
        """Prompts -> condition.

        Raises:
            RequestError: If they are no texts, or unknown after `free_text_encoders`.
        """
        device: torch.device = self.device  # type: ignore[attr-defined]
        return self.prompts.condition(labels, device)


def blank_prompts(**shapes: tuple[int, ...]) -> Prompts:
    """Zeros of the right shapes, by name, for any prompt: a skeleton's."""

    def encode(prompts: list[str]) -> Embeddings:
        return {name: torch.zeros(len(prompts), *shape) for name, shape in shapes.items()}

    return Prompts(encode, lambda: encode([""]))


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders that a diffusers pipeline has, by name; none where there is no pipeline."""
    held = {name: getattr(pipeline, name, None) for name in ENCODERS}
    return {name: encoder for name, encoder in held.items() if encoder is not None}


def tokenizer_digests(pipeline: Any) -> dict[str, str]:
    """SHA-256 of what each tokenizer of a diffusers pipeline makes of texts: its vocabulary, and how long it lets them be."""
    held = {name: getattr(pipeline, name, None) for name in TOKENIZERS}
    told = {name: [sorted(one.get_vocab().items()), one.model_max_length] for name, one in held.items() if one is not None}
    return {name: hashlib.sha256(json.dumps(each).encode()).hexdigest() for name, each in told.items()}


def readers(pipeline: Any, **most: int) -> dict[str, tuple[Any, int]]:
    """The tokenizers of a diffusers pipeline, each with how many tokens it is cut at: its own maximum, but for those named."""
    held: dict[str, Any] = {name: getattr(pipeline, name, None) for name in TOKENIZERS}
    return {name: (one, int(most.get(name) or one.model_max_length)) for name, one in held.items() if one is not None}


def free_encoders(pipeline: Any) -> None:
    """Takes a diffusers pipeline its text encoders and tokenizers away."""
    for name in (*ENCODERS, *TOKENIZERS):
        if hasattr(pipeline, name):
            setattr(pipeline, name, None)


def runs_on(module: Any) -> torch.device:
    """Where a module computes: under CPU offload, the hooks of its parts say so."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return module.device


def refuse_for_prompts(options: ModelOptions, spare: tuple[str, ...]) -> None:
    """Refuses options that a pipeline with prompts does not have."""
    for field in ("classes", "null_class"):
        if (given := getattr(options, field)) is not None:
            problem = "this model takes prompts, not labels"
            raise RequestError(f"model.{field}", given, problem, "Leave it out, and give a prompt for each class.")
    for component in options.without:
        if component not in spare:
            remedy = f"Remove it from model.without; only these parts can be left out: {', '.join(spare)}."
            raise RequestError("model.without", component, "this pipeline needs this part, or has no part of that name", remedy)
