"""Data preparation: text → tokenizer → Megatron `.bin/.idx` token files.

Modules, in the order in which data passes through them:

- `sources`: `Corpus(inputs)`: files, folders, globs and hub datasets in a fixed order; `stdlib_corpus()`.
- `inputs`, `formats`: expand names and patterns to files, without ELAS's own output; detect a file's format.
- `readers`: turn each kind of file into documents, piece by piece; bad input is named and counted, never fatal.
  `delimited`, `parquet` and `hub` read their formats; `fields` finds the text in a record.
- `tokenizer_training`: `train_tokenizer(documents, output, vocab_size=…)` writes a tokenizer folder.
- `tokenize_corpus`: `tokenize_corpus(corpus, tokenizer_path, output_prefix, options)`: plan → tasks → merge.
- `options`, `plan`: checked options; the corpus cut into tasks.
- `steps`, `encoder`, `quality`, `loss`, `shards`: the work of one task, run by datatrove's pipeline.
- `executors`: where tasks run: local, SLURM, Ray.
- `merge`, `duplicates`, `indexed_writer`, `held_out`: stream the tasks' parts into the final files.
- `unread`: how much could not be read, and when that is too much.
- `verify`, `info`: check and describe token files.
- `cli`, `progress`, `memory`, `folders`: `elas prep …` and its helpers.

Nothing here imports torch or Megatron, so worker processes stay small. Tokenizers are opened by `elas.data.tokenizer`.
"""
