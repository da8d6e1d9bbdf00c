"""Data preparation: text files → SentencePiece tokenizer → Megatron `.bin/.idx` token files.

The parts, in the order data passes through them:

- `sources`: `Corpus(inputs)` and `stdlib_corpus()` stream `Document(name, text)`; bad input is counted, never fatal.
- `tokenizer_training`: `train_tokenizer(documents, output, vocab_size=…)` writes a tokenizer folder.
- `tokenizer`: `load_tokenizer(path)` opens such a folder, or a Hugging Face one, behind one interface.
- `tokenize_corpus`: `tokenize_corpus(documents, tokenizer_path, output_prefix, …)` writes the token files.
- `encoding_pool`: the worker processes behind it.
- `indexed_writer`: puts `.bin`, `.idx` and `.manifest.json` in place, whole or not at all.
- `folders`: output folders, made early and removed again if nothing came of them.
- `cli`: `elas prep tokenizer` and `elas prep tokenize`.

Only `indexed_writer` imports torch and Megatron, and only when the first token is written: worker processes stay small.
"""
