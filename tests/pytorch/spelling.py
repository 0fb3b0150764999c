"""Tokenizers made on the spot, of the kinds that published models have."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


def bytewise() -> Tokenizer:
    """Byte-level BPE, with merges that end within a character and one across two of them."""
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    euro, face, accent = (_spelled(c) for c in "€😀é")
    merges = [(euro[0], euro[1]), (face[0], face[1]), (accent[1], face[0])]
    merges += [("t", "h"), ("i", "n"), ("th", "e"), ("Ġ", "w")]
    vocabulary = letters | {a + b: len(letters) + n for n, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def _spelled(character: str) -> str:
    """Its bytes, in the letters that stand for bytes."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((text, _),) = split.pre_tokenize_str(character)
    return text


def pieces() -> Tokenizer:
    """SentencePiece's kind: a mark for a space, bytes for what has no piece, a stripped start."""
    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz!,"]
    merges = [("▁", "w"), ("t", "h"), ("th", "e"), ("▁", "the")]
    words += [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={w: n for n, w in enumerate(words)}, merges=merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_special(tokenizer)


def wordpieces() -> Tokenizer:
    """WordPiece, which joins the parts of words and takes spaces before punctuation away."""
    words = ["[UNK]", "the", "wind", "##s", "##y", "!", ",", "€", "😀", "é", "w", "a"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={w: n for n, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    """``<s>`` before each text, and ``</s>``."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return tokenizer
