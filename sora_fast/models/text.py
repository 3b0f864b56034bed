"""Text as packed tokens: what cross-attention reads, and the encoders that make it.

An encoder works in two steps. `tokenize` runs on the host, in a data loader, and gives tensors of static shape; calling
the encoder on them gives a PackedText, without a sync, so that it compiles together with the model.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_fast.ops.segment_mean import segment_mean
from sora_fast.packing import PackedLayout
from sora_fast.packing._bundle import TensorBundle

log = logging.getLogger(__name__)

T5_TOKENS = 226  # what CogVideoX and others give it


@dataclass(frozen=True, eq=False)
class PackedText(TensorBundle):
    """The text tokens of S segments.

    tokens [Nt, dim]: zeros on padding; layout: grids (L, 1, 1); pooled [S, dim]: one vector a text, or None.
    """

    tokens: Tensor
    layout: PackedLayout
    pooled: Tensor | None = None

    def take(
        self, texts: Sequence[int], *, capacity: int | None = None, max_segments: int | None = None
    ) -> "PackedText":
        """Some of them, in this order and as often as they are named (waits for the device). capacity, max_segments: as
        of a layout; what is left is empty."""
        lengths = self.layout.cu_seqlens.diff().tolist()
        parts = self.tokens[: sum(lengths)].split(lengths)
        grids = [(lengths[i], 1, 1) for i in texts]
        layout = PackedLayout.from_grids(grids, capacity=capacity, max_segments=max_segments).to(self.layout.device)
        tokens = torch.cat([parts[i] for i in texts])
        pooled = None if self.pooled is None else self.pooled[list(texts)]
        return PackedText(
            F.pad(tokens, (0, 0, 0, layout.capacity - len(tokens))),
            layout,
            pooled if pooled is None else F.pad(pooled, (0, 0, 0, layout.max_segments - len(pooled))),
        )


class TextEncoder(Protocol):
    """Prompts in, PackedText out. `dim` is the width of both tokens and pooled vectors."""

    dim: int

    def tokenize(
        self, prompts: Sequence[str], *, capacity: int | None = None, max_segments: int | None = None
    ) -> tuple[Tensor, PackedLayout]:
        """(ids [capacity] int32, layout) on the CPU. A prompt that is too long is cut, and the log says so once.

        "" is "no prompt".
        """
        ...

    def check(self, prompts: Sequence[str]) -> None:
        """Say which prompts are too long, as `tokenize` does, all of them together."""
        ...

    def __call__(self, ids: Tensor, layout: PackedLayout) -> PackedText: ...


class ByteTextEncoder(nn.Module):
    """A small encoder of UTF-8 bytes that is trained along with the model.

    A byte is embedded together with the n-grams that end in it (hashed, as in the Byte Latent Transformer, arXiv
    2412.09871), so that different words are far apart from the first step on. Tokens go through residual blocks of
    dilated depthwise convolution and MLP: with kernel 5 and dilations 1, 2, 4 they reach 14 bytes to each side, several
    words. The pooled vector is the bag of n-grams itself, Σ / √length: behind norms and blocks, what two prompts share
    grew in training at the cost of what they differ in. Every prompt begins with a token of its own, which is all that
    "" consists of.
    max_bytes: longer prompts are cut, between two characters.
    """

    START = 256
    NGRAMS = range(2, 7)
    BUCKETS = 4096

    def __init__(self, dim: int = 128, *, layers: int = 3, kernel_size: int = 5, max_bytes: int = 255) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size}; it must be odd, to be centred on its byte")
        self.dim, self.max_bytes = dim, max_bytes
        self._cuts = _Cuts(max_bytes, "bytes")
        self.embedding = nn.Embedding(257, dim)
        self.ngrams = nn.Embedding(self.BUCKETS, dim)
        self.blocks = nn.ModuleList(_ByteBlock(dim, kernel_size, dilation=2**layer) for layer in range(layers))
        self.norm = nn.LayerNorm(dim)
        for table in (self.embedding, self.ngrams):  # six of them make a byte, of about unit variance
            nn.init.normal_(table.weight, std=0.5)

    def tokenize(
        self, prompts: Sequence[str], *, capacity: int | None = None, max_segments: int | None = None
    ) -> tuple[Tensor, PackedLayout]:
        """(ids [capacity] int32, layout); see TextEncoder. ValueError if the prompts do not fit."""
        self.check(prompts)
        texts = (prompt.encode()[: self.max_bytes].decode(errors="ignore") for prompt in prompts)
        return _pack([[self.START, *text.encode()] for text in texts], capacity, max_segments)

    def check(self, prompts: Sequence[str]) -> None:
        """See TextEncoder."""
        self._cuts.say(prompts, [len(prompt.encode()) for prompt in _checked_prompts(prompts)])

    def forward(self, ids: Tensor, layout: PackedLayout) -> PackedText:
        x = self.embedding(ids) + self._embed_ngrams(ids, layout.segment_ids)
        lengths = layout.cu_seqlens.diff().clamp(min=1)[:, None]
        pooled = segment_mean(x, layout) * lengths.to(x.dtype).sqrt()
        for block in self.blocks:
            x = block(x, layout.segment_ids)
        x = torch.where(layout.segment_ids[:, None] >= 0, self.norm(x), 0)
        return PackedText(x, layout, pooled)

    def _embed_ngrams(self, ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Sum over n of the embeddings of each byte's n-gram; what would reach before its prompt is left out."""
        code, total = ids.long(), torch.zeros((), dtype=self.ngrams.weight.dtype, device=ids.device)
        for n in self.NGRAMS:
            before = F.pad(ids.long() + 1, (n - 1, 0))[: ids.shape[0]]
            owner = F.pad(segment_ids, (n - 1, 0), value=-1)[: ids.shape[0]]
            # A polynomial hash modulo the prime 2³¹ − 1; the products stay below 2⁶³.
            code = (code * 1_000_003 + torch.where(owner == segment_ids, before, 0)) % (2**31 - 1)
            total = total + self.ngrams(code % self.BUCKETS)
        return total


class _ByteBlock(nn.Module):
    def __init__(self, dim: int, kernel_size: int, *, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.taps = nn.Parameter(torch.randn(kernel_size, dim) / kernel_size**0.5)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, segment_ids: Tensor) -> Tensor:
        """x: [N, C] → [N, C]; a token sees only neighbours of its own segment."""
        size, reach = x.shape[0], self.dilation * (self.taps.shape[0] // 2)
        neighbours = F.pad(x, (0, 0, reach, reach))
        owners = F.pad(segment_ids, (reach, reach), value=-1)
        mixed = torch.zeros_like(x)
        for tap, weight in enumerate(self.taps):
            place = slice(tap * self.dilation, tap * self.dilation + size)
            mixed = mixed + weight * neighbours[place] * (owners[place] == segment_ids)[:, None]
        return x + self.mlp(self.norm(mixed))


class TransformersTextEncoder(nn.Module):
    """A frozen CLIP or T5 text encoder of the `transformers` library, from a local folder with safetensors weights.

    folder: as `save_pretrained` writes it: config.json, *.safetensors and the tokenizer's files. Nothing is downloaded,
    and pickled weights are refused, since reading them can run any code.
    max_tokens: longer prompts are cut; default: CLIP's 77 positions, T5_TOKENS for T5.
    pooled: CLIP's own pooled vector; for T5, which has none, the mean of the tokens.
    """

    def __init__(
        self, folder: str | Path, *, max_tokens: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        folder = _checked_folder(folder)
        from transformers import AutoTokenizer

        config = _library_config(folder)
        self.is_clip = config.model_type in ("clip", "clip_text_model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        self.encoder, report = _encoder_class(config.model_type).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
        if report["missing_keys"]:  # the library would go on with random values
            raise ValueError(f"folder: {folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}, …")
        self.encoder.eval().requires_grad_(False)
        self.dim: int = self.encoder.config.hidden_size
        self.max_tokens = max_tokens or (self.encoder.config.max_position_embeddings if self.is_clip else T5_TOKENS)
        self._cuts = _Cuts(self.max_tokens, "tokens")

    @staticmethod
    def width(folder: str | Path) -> int:
        """The `dim` of the encoder in a folder, from its config.json alone."""
        config = _library_config(_checked_folder(folder))
        _encoder_class(config.model_type)
        return config.get_text_config().hidden_size

    @staticmethod
    def fingerprint(folder: str | Path) -> str:
        """A hash of what is read of a folder: configuration, tokenizer and weights, by file; of large files, parts.

        Weights that were trained any further differ in every part. Reads at most 16 MiB of a file.
        """
        digest = hashlib.sha256()
        for file in sorted(_checked_folder(folder).iterdir(), key=lambda file: file.name):
            if file.name in _READ or file.suffix == ".safetensors":
                size = file.stat().st_size
                digest.update(f"{file.name} {size}\n".encode())
                with file.open("rb") as content:
                    for start in range(0, size, max(_PART, size // 256)):
                        content.seek(start)
                        digest.update(content.read(_PART))
        return digest.hexdigest()[:16]

    def train(self, mode: bool = True) -> "TransformersTextEncoder":
        """Stays in evaluation mode: it is frozen, dropout included."""
        return super().train(False)

    def tokenize(
        self, prompts: Sequence[str], *, capacity: int | None = None, max_segments: int | None = None
    ) -> tuple[Tensor, PackedLayout]:
        """(ids [capacity] int32, layout); see TextEncoder. ValueError if the prompts do not fit."""
        rows = self._ids(_checked_prompts(prompts), truncation=True, max_length=self.max_tokens)
        # Only full rows may have been cut: the others are not tokenized a second time.
        self.check([prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) == self.max_tokens])
        return _pack(rows, capacity, max_segments)

    def check(self, prompts: Sequence[str]) -> None:
        """See TextEncoder."""
        self._cuts.say(prompts, [len(row) for row in self._ids(_checked_prompts(prompts), verbose=False)])

    def _ids(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        return self.tokenizer(list(prompts), **options)["input_ids"] if prompts else []

    @torch.no_grad()
    def forward(self, ids: Tensor, layout: PackedLayout) -> PackedText:
        """The library wants rows of equal length: [S, max_tokens] with a mask, then packed again."""
        starts, lengths = layout.cu_seqlens[:-1, None], layout.cu_seqlens.diff()[:, None]
        column = torch.arange(self.max_tokens, device=ids.device)
        real = column < lengths
        padded = torch.where(real, ids[(starts + column).clamp(max=ids.shape[0] - 1)], self._padding_id)
        # An unused segment attends one padding token: attention to nothing would be NaN.
        output = self.encoder(input_ids=padded.long(), attention_mask=(real | (column == 0)).long())
        used = layout.segment_ids >= 0
        tokens = output.last_hidden_state[layout.segment_ids.clamp(min=0), layout.coords[:, 0]]
        tokens = torch.where(used[:, None], tokens, 0)
        pooled = torch.where(lengths > 0, output.pooler_output, 0) if self.is_clip else segment_mean(tokens, layout)
        return PackedText(tokens, layout, pooled)

    @property
    def _padding_id(self) -> int:
        return self.tokenizer.pad_token_id or 0


# Beside the weights; files of other names change nothing.
_READ = (
    "config.json",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_PART = 64 << 10  # bytes
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def _library_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **_LOCAL)


def _encoder_class(model_type: str) -> Any:
    import transformers

    names = {
        "clip": "CLIPTextModel",
        "clip_text_model": "CLIPTextModel",
        "t5": "T5EncoderModel",
        "umt5": "UMT5EncoderModel",
    }
    if model_type not in names:
        raise ValueError(f"folder: it holds a {model_type!r} model; it must be one of {tuple(names)}")
    return getattr(transformers, names[model_type])


def _checked_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder: {folder} has no config.json; it must be a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"folder: {folder} has no *.safetensors; pickled weights are not read, convert them first")
    return folder


def _checked_prompts(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str):
        raise TypeError(f"prompts: one string, {prompts!r}; it must be a list of strings")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line or a file name that are no UTF-8
            raise ValueError(f"prompts: {prompt!r} holds what is no character; it must be valid Unicode") from error
    return prompts


class _Cuts:
    """Says of every text that is longer than an encoder takes, once, how long it is; of an endless stream, some."""

    MOST = 10

    def __init__(self, limit: int, unit: str) -> None:
        self.limit, self.unit = limit, unit
        self._said: set[str] = set()
        self._times = 0

    def say(self, texts: Sequence[str], lengths: Sequence[int]) -> None:
        long = [(length, _beginning(text)) for text, length in zip(texts, lengths, strict=True) if length > self.limit]
        if self._times == self.MOST or self._said.issuperset(text for _, text in long):
            return
        self._times += 1
        self._said.update(text for _, text in long)
        length, text = max(long)
        log.warning(
            "cut to the %d %s that the text encoder takes: %s of %d, %r%s",
            self.limit,
            self.unit,
            "a text" if len(long) == 1 else f"{len(long)} texts, the longest",
            length,
            text,
            "; what is cut from now on is not named any more" if self._times == self.MOST else "",
        )


def _beginning(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _pack(rows: list[list[int]], capacity: int | None, max_segments: int | None) -> tuple[Tensor, PackedLayout]:
    layout = PackedLayout.from_grids([(len(row), 1, 1) for row in rows], capacity=capacity, max_segments=max_segments)
    ids = torch.zeros(layout.capacity, dtype=torch.int32, device="cpu")
    flat = [token for row in rows for token in row]
    ids[: len(flat)] = torch.tensor(flat, dtype=torch.int32, device="cpu")
    return ids, layout
