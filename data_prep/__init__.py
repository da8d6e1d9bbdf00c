"""Data preparation: text → tokenizer → Megatron `.bin/.idx` token files.

The parts, in the order data passes through them:

- `sources`: `Corpus(inputs)`: files, folders, globs, hub datasets, in a fixed order; `stdlib_corpus()`.
- `inputs`, `formats`: names and patterns to files, without what elas wrote; what a file is, by name and content.
- `readers`: how each kind of file becomes documents, piece by piece; bad input is named and counted, never fatal.
  `delimited`, `parquet` and `hub` read what their names say, `fields` finds the text in a record.
- `tokenizer_training`: `train_tokenizer(documents, output, vocab_size=…)` writes a tokenizer folder.
- `tokenizer`: `load_tokenizer(path)` opens such a folder, or a Hugging Face one, behind one interface.
- `tokenize_corpus`: `tokenize_corpus(corpus, tokenizer_path, output_prefix, options)`: plan → tasks → merge.
- `plan`: the corpus cut into tasks; `steps`, `quality`, `shards`: what a task does, as datatrove's pipeline runs it.
- `executors`: where tasks run: local, SLURM, Ray.
- `merge`, `duplicates`, `indexed_writer`: the parts put together, as a stream.
- `unread`: how much could not be read, and when that is too much.
- `verify`, `info`: what lies in token files, and whether it is whole.
- `cli`, `progress`, `memory`, `folders`: `elas prep …` and its helpers.

Nothing here imports torch or Megatron: worker processes stay small.
"""
