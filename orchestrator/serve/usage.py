"""Python snippet for the model card; it runs unchanged in the bundle's folder."""

from __future__ import annotations

from orchestrator.serve.bundle_inputs import BundleInputs
from orchestrator.serve.classifier import LOADER
from orchestrator.transfer.records import TransferReport

MAX_PROMPT_CHARACTERS = 240
"""Maximum characters of a test prompt that the snippet shows."""
NEW_TOKENS = 64
LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
"""
LOAD_BOTH = LOAD.replace("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
ANSWER = f"""output = model.generate(**inputs, max_new_tokens={NEW_TOKENS}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
ANSWER_OF_BOTH = ANSWER.replace('output[0, inputs["input_ids"].shape[1] :]', "output[0]")
GGUF_FAMILIES = ("llama", "mistral", "qwen", "gemma")
"""Beginnings of the model types for which a card names llama.cpp's converter."""
WITHOUT_HEAD = ("gemma", "gemma2")
"""Model types whose output projection that converter leaves out: it takes the embeddings instead."""


def gguf_rule(inputs: BundleInputs) -> str:
    """Return how the bundle is converted to GGUF; empty if the converter does not know it, or would lose its trained head."""
    anatomy = inputs.anatomy
    loses_head = anatomy.model_type in WITHOUT_HEAD and anatomy.head_weight in (
        *inputs.selection.trainable,
        *inputs.selection.adapted,
    )
    if not anatomy.model_type.startswith(GGUF_FAMILIES) or loses_head:
        return ""
    return "For llama.cpp, its converter reads this folder: `python convert_hf_to_gguf.py . --outfile model.gguf`."


def prompt_rule(inputs: BundleInputs) -> str:
    """Return how a prompt must be put to the bundle; empty where any text will do."""
    if inputs.base.traits.uses_chat_template:
        return "Prompts go through the tokenizer's chat template."
    if inputs.base.traits.uses_separator:
        separator = repr(inputs.separator)
        return f"A prompt is followed by the separator {separator}; the answer ends with the tokenizer's end token."
    return ""


def snippet(inputs: BundleInputs, transfer: TransferReport) -> str:
    """Return Python that loads the bundle from the current folder and prints one answer, by the bundle's task."""
    traits = inputs.base.traits
    load = LOAD.replace('"."', '".", trust_remote_code=True') if inputs.base.code_sha256 else LOAD
    shown = next((pair.prompt for pair in transfer.prompts if 0 < len(pair.prompt) <= MAX_PROMPT_CHARACTERS), "")
    if traits.head.supervises == "documents":
        text = shown or "A text to classify."
        if not inputs.base.pooling.by_class:
            return f"""from {LOADER.removesuffix(".py")} import load

classifier = load(".")
print(classifier([{text!r}]))
"""
        return f"""from transformers import pipeline

classifier = pipeline({traits.head.pipeline_tag!r}, model=".")
print(classifier({text!r}))
"""
    if traits.uses_chat_template:
        return f"""{load}
messages = [{{"role": "user", "content": "A question."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
{ANSWER}"""
    prompt = f"{(shown or 'A prompt.')!r}"
    if traits.uses_separator:  # as in training, the separator is inserted between prompt and answer
        prompt = f"{prompt} + {inputs.separator!r}"
    encodes = inputs.anatomy.kind == "encoder_decoder"
    return f"""{LOAD_BOTH if encodes else load}
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
{ANSWER_OF_BOTH if encodes else ANSWER}"""
