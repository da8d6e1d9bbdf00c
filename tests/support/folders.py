"""Small models as Hugging Face folders, for tests."""

from pathlib import Path

import torch

TEXTS = [
    "the cat sat on the mat",
    "a dog ran over the hill",
    "def run(self): return self.value",
    "naïve café – 你好 🙂",
]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of some hundred tokens, with `</s>` as the end, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def write_model(folder: Path, **changes) -> Path:
    """A random ELAS model of 2 layers in transformers' form, with the tokenizer of `write_tokenizer`."""
    from elas.hf.configuration_elas import ElasConfig
    from elas.hf.modeling_elas import ElasForCausalLM

    shape = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(rank=16, max_position_embeddings=96, eos_token_id=0, initializer_range=0.2)
    torch.manual_seed(0)
    ElasForCausalLM(ElasConfig(**shape | changes)).save_pretrained(folder)
    return write_tokenizer(folder)
