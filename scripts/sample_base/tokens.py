"""The sample base's tokenizer: byte-level BPE, digits apart, role markers and a chat template that marks what is learnt."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# `generation` marks the assistant's own tokens; without it the assistant mask would be all zero.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eos|>{% endgeneration %}\
{% else %}{{ m['content'] }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def train_tokenizer(texts: Iterable[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Special tokens take the first ids: pad 0, bos 1, eos 2, then the roles."""
    bpe = Tokenizer(models.BPE())
    # Digits stand alone, so that a number the model has never seen is still spelt from parts it has.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=max_tokens
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
