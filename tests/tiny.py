"""Tiny random models, a tokenizer of their own, and tiny tasks, for tests of whole measurements."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import headcount.tasks
from headcount.cli import main
from headcount.model.load import LoadedModel, wrap

FAMILIES = ("opt", "opt-350m", "llama", "gpt2", "gpt_neox")
VOCAB, WINDOW = 2048, 512
_RELATIONS = Path(headcount.tasks.__file__).parent / "data" / "icl"
# ChatML, as SmolLM2's.
_CHAT = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
         "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
         "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer as GPT-2's and SmolLM2's, learnt here from the words of the embedded relations.

    SmolLM2's own takes seconds to be read off its GGUF file, and its 49,152 tokens make up most of a tiny model's work.
    """
    learnt = Tokenizer(BPE())
    learnt.pre_tokenizer, learnt.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    learnt.train_from_iterator(
        (file.read_text(encoding="utf-8").replace('"', " ") for file in sorted(_RELATIONS.glob("*/*.jsonl"))),
        BpeTrainer(vocab_size=VOCAB, show_progress=False, special_tokens=list(special.values()),
                   initial_alphabet=ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=learnt, **special, pad_token=special["eos_token"],
                                   chat_template=_CHAT)


def model(family: str, seed: int = 0, layers: int = 3) -> PreTrainedModel:
    """All weights and biases random, so that nothing is right by being zero."""
    torch.manual_seed(seed)
    if family == "opt":
        built = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, ffn_dim=48,
                                         num_attention_heads=4, max_position_embeddings=WINDOW, word_embed_proj_dim=32,
                                         dropout=0.0))
    elif family == "opt-350m":
        built = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, ffn_dim=48,
                                         num_attention_heads=4, max_position_embeddings=WINDOW, word_embed_proj_dim=16,
                                         do_layer_norm_before=False, dropout=0.0))
    elif family == "llama":
        built = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
                                             num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                                             max_position_embeddings=WINDOW))
    elif family == "gpt2":
        built = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=layers, n_head=4, n_positions=WINDOW,
                                           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        built = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers,
                                                 num_attention_heads=4, intermediate_size=48,
                                                 max_position_embeddings=WINDOW))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.15)
    return built.eval()


@functools.cache
def loaded(family: str = "llama", seed: int = 0, layers: int = 3) -> LoadedModel:
    return wrap(model(family, seed, layers), tokenizer(), name=f"tiny-{family}")


def saved(folder: Path, family: str = "llama") -> Path:
    """A model's folder, as save_pretrained writes it, with its tokenizer."""
    model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str = "piqa", train: int = 12, validation: int = 8) -> Path:
    """Documents of our own in a task's field names, as `--data` wants them."""
    for split, n, start in (("train", train, 0), ("validation", validation, 1000)):
        rows = [{"goal": f"Count the {w} from {start + i}", "sol1": f"Say {start + i + 1}.",
                 "sol2": f"Say {start + i - 1} and stop now.", "label": i % 2}
                for i, w in zip(range(n), ["cats", "dogs", "hats", "red cars"] * n, strict=False)]
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def run(command: list[str]) -> int:
    """A command's exit code."""
    try:
        return main(command)
    except SystemExit as ended:
        return int(str(ended.code))
