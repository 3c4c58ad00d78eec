"""Read, check, split, tokenize and pack the data.

    summary = prepare_data(loaded, tokenizer_folder, run.data)     # train.npz eval.npz test.npz retain.npz summary.json
    train = TokenizedSet.load(run.data / "train.npz")
    steps = documents_of_steps(train.offsets, tokens_per_step, seed, epoch)
    rows = pack_rows(train.lengths, steps[0], row_tokens, pack=True)
    batches = micro_batches(train, rows, rank, num_ranks, rows_per_micro_batch)

Documents that share a row do not see each other: their positions start at 0, and from the restarts transformers makes a
block-diagonal mask, provided that the model is called as

    model(input_ids=..., position_ids=..., use_cache=False)

with no attention mask whatever. Measured with transformers 5.23 on Llama, Qwen2 and Mistral (sliding window), sdpa and
eager, several rows: losses of packed documents are bit-equal to those of the same documents alone. Any 2-d attention mask,
even one of ones, and any key-value cache, even one that the model's configuration turns on, switch the detection off
without a word, and documents see each other. Rows that are classified hold one document and take a padding mask instead.
"""

from orchestrator.data.batching import UNSUPERVISED, MicroBatch, documents_of_steps, micro_batches, pack_rows
from orchestrator.data.encoding.encoder import load_tokenizer
from orchestrator.data.encoding.end_tokens import padding
from orchestrator.data.few_shot import with_shots
from orchestrator.data.prepare import data_size, prepare_data
from orchestrator.data.replay import replayed_documents
from orchestrator.data.sets import TokenizedSet, build_set, joined, shuffled
from orchestrator.data.shares import documents_of_share, size_of_share
from orchestrator.data.summary import DataSummary, Dropped, SplitSummary

__all__ = [
    "UNSUPERVISED",
    "DataSummary",
    "Dropped",
    "MicroBatch",
    "SplitSummary",
    "TokenizedSet",
    "build_set",
    "data_size",
    "documents_of_share",
    "documents_of_steps",
    "joined",
    "load_tokenizer",
    "micro_batches",
    "pack_rows",
    "padding",
    "prepare_data",
    "replayed_documents",
    "shuffled",
    "size_of_share",
    "with_shots",
]
