"""Tiny tokenizers of other kinds than BERT's, trained on a few lines, in Hugging Face's layout."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The film was good, and the story of it very fine.", "We saw an awful book; it was a poor one.",
    "A lovely story, a happy film: great!",
    "Caf\u00e9 na\u00efve \u00fcber stra\u00dfe, it's 12.50 \u20ac \U0001f600",
    "the ugly film was sad, the great book was lovely", "Newlines, tabs and  double spaces",
] * 3
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ALBERT_TOKENS = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]


def _mask(content: str) -> AddedToken:
    return AddedToken(content, lstrip=True, normalized=False, special=True)  # as published


def _write(folder: Path, tokenizer: Tokenizer, model_type: str, settings: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in (("config.json", {"model_type": model_type}),
                         ("tokenizer_config.json", settings)):
        if values is not None and not (folder / name).is_file():
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def byte_bpe(folder: Path, settings: dict | None = None, model_type: str = "roberta") -> Path:
    """Write a tokenizer as RoBERTa's; returns the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*ROBERTA_TOKENS[:4], _mask("<mask>")], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.decoder = decoders.ByteLevel()
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>")}
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False)
    return _write(folder, tokenizer, model_type, settings)


def unigram(folder: Path, settings: dict | None = None, model_type: str = "albert") -> Path:
    """Write a tokenizer as ALBERT's; returns the folder."""
    tokenizer = _train_unigram(ALBERT_TOKENS, normalizers.Sequence([
        normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(),
        normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex(" {2,}"), " ")]))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")])
    return _write(folder, tokenizer, model_type, settings)


def xlm_unigram(
    folder: Path, settings: dict | None = None, model_type: str = "xlm-roberta"
) -> Path:
    """Write a tokenizer as XLM-RoBERTa's, but for its normalizer; returns the folder."""
    tokenizer = _train_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], None)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>",
        [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")])
    return _write(folder, tokenizer, model_type, settings)


def _train_unigram(tokens: list[str], normalizer: normalizers.Normalizer | None) -> Tokenizer:
    """Train on `LINES`, with these special tokens, the last of them for masks."""
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*tokens[:-1], _mask(tokens[-1])], unk_token="<unk>",
        show_progress=False))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer
