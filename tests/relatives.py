"""Tiny random models of BERT's relatives, as Hugging Face makes and writes them."""

import json
from pathlib import Path

import torch
import transformers
from helpers import random_batch, read_json, tiny_config, write_vocab
from tiny_tokenizers import byte_bpe, unigram

from transformer.config import BertConfig
from transformer.tokenization import load_tokenizer

WIDE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 24, "vocab_size": tiny_config().vocab_size,
        "max_position_embeddings": 40, "initializer_range": 0.3}
# What each family's tiny models are made of, besides.
SHAPES = {
    "roberta": ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta, two segments, padding 3": ("roberta", {"pad_token_id": 3}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1, "hidden_act": "relu"}),
    "camembert": ("camembert", {"type_vocab_size": 1}),
    "electra": ("electra", {"embedding_size": 16}),
    "electra, narrow embeddings": ("electra", {"embedding_size": 6}),
    "albert": ("albert", {"embedding_size": 6}),
    "albert, two groups": ("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "distilbert": ("distilbert", {}),
    "distilbert, waves": ("distilbert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
# How a family's tokenizer is made, where it is not BERT's, and its tokenizer_config.json.
TOKENIZERS = {
    "roberta": (byte_bpe, {"tokenizer_class": "RobertaTokenizer"}),
    # Hugging Face's class makes no segments unless it is told to.
    "albert": (unigram, {"tokenizer_class": "AlbertTokenizer", "model_input_names": INPUTS}),
}


def their_config(shape: str, **changes):
    """Return a tiny Hugging Face config of a family."""
    name, own = SHAPES[shape]
    values = {**WIDE, **own, **changes}
    names = {"intermediate_size": "hidden_dim"} if name == "distilbert" else {}
    return transformers.CONFIG_MAPPING[name](
        **{names.get(key, key): value for key, value in values.items()})


def their_model(folder: Path, shape: str, kind: str = "SequenceClassification", **changes):
    """Save a random tiny Hugging Face model, biases and norms included, with our vocabulary."""
    torch.manual_seed(0)
    auto = transformers.AutoModel if not kind else getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_config(their_config(shape, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_vocab(folder)
    model.save_pretrained(folder)
    if SHAPES[shape][0] in ("roberta", "distilbert"):  # whose tokenizers make no segments
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(
            {**read_json(path), "model_input_names": ["input_ids", "attention_mask"]}))
    return model.eval()


def published(folder: Path, shape: str, kind: str = "SequenceClassification"):
    """Save a random tiny model of a family with a tokenizer of the kind that it has."""
    values = {"max_position_embeddings": 140, "pad_token_id": 0}
    if shape in TOKENIZERS:
        make, settings = TOKENIZERS[shape]
        pieces = load_tokenizer(make(folder))
        values |= {"vocab_size": len(pieces), "pad_token_id": pieces.pad_id}
    model = their_model(folder, shape, kind, **values)
    if shape in TOKENIZERS:
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        make(folder, settings)
    return model


def batch_of(config, rows: int = 4, length: int = 11):
    """Return ids, segments and mask; the padding is the model's, and segments are its own."""
    ids, segments, mask = random_batch(rows, length)
    ids = torch.where(mask.bool(), ids, config.pad_token_id)
    return ids, segments * (BertConfig.from_dict(config.to_dict()).type_vocab_size > 1), mask


def their_inputs(config, ids, segments, mask):
    """Return the batch as a Hugging Face model takes it: a DistilBERT has no segments."""
    given = {"input_ids": ids, "attention_mask": mask}
    return given if config.model_type == "distilbert" else {**given, "token_type_ids": segments}


def change_config(folder: Path, **changes) -> None:
    values = {**read_json(folder / "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps(values))
