"""The generated model, read as vLLM reads it and continued token by token."""

import json

import ml_dtypes  # noqa: F401  teaches numpy bfloat16, which safetensors then loads
import numpy as np
import pytest
from openai_harmony import (
    Conversation,
    HarmonyEncodingName,
    Message,
    Role,
    StreamableParser,
    load_harmony_encoding,
)
from safetensors.numpy import load_file

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="session")
def harmony():
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="session")
def model(tiny_gpt_oss, tmp_path_factory):
    """The model's directory; tests that change it make their own."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    assert tiny_gpt_oss.write(directory)
    return directory


@pytest.fixture(scope="session")
def tensors(model):
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="session")
def logits(tensors):
    """The scores of all next tokens after a token, computed as the model does.

    Attention and experts add nothing to the residual stream (a test shows it), so what remains is
    embedding, final norm and output projection.
    """
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]

    def after(token):
        state = embedding[token].astype(np.float32)
        state /= np.sqrt(np.mean(state**2) + 1e-5)
        return head.astype(np.float32) @ (state * tensors["model.norm.weight"].astype(np.float32))

    return after


@pytest.fixture(scope="session")
def answer(logits):
    """Continue a prompt by always taking the best next token."""

    def continued(prompt, count):
        tokens = [prompt[-1]]
        while len(tokens) <= count:
            tokens.append(int(np.argmax(logits(tokens[-1]))))
        return tokens[1:]

    return continued


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_layers_add_nothing_to_the_embedding(tensors):
    outputs = ("o_proj.weight", "o_proj.bias", "down_proj", "down_proj_bias")
    found = [name for name in tensors if name.endswith(outputs)]
    assert len(found) == 4 * 4
    assert not any(tensors[name].any() for name in found)


def test_chat_answer_is_a_final_harmony_message_that_repeats_the_sentence(answer, harmony, tiny_gpt_oss):
    question = Conversation.from_messages([Message.from_role_and_content(Role.USER, "hi")])
    prompt = harmony.render_conversation_for_completion(question, Role.ASSISTANT)
    parser = StreamableParser(harmony, role=Role.ASSISTANT)
    for token in answer(prompt, 80):
        parser.process(token)
    assert parser.current_channel == "final"
    repeated = " ".join([tiny_gpt_oss.SENTENCE] * 3)
    assert len(parser.current_content) > 2 * len(tiny_gpt_oss.SENTENCE)
    assert repeated.startswith(parser.current_content)


def test_text_completion_says_the_sentence_after_any_token(answer, harmony, tiny_gpt_oss):
    sentence = harmony.encode(" " + tiny_gpt_oss.SENTENCE)
    for text in ("Hello", "\n", "42", "<|end|>"):
        assert answer(harmony.encode(text, allowed_special="all"), len(sentence)) == sentence


def test_sampling_at_temperature_one_takes_the_same_token(logits, harmony):
    scores = logits(harmony.encode("Hello")[0]).astype(np.float64)
    probabilities = np.exp(scores - scores.max())
    assert probabilities.max() / probabilities.sum() > 1 - 1e-9


def test_tensors_have_the_shapes_that_the_config_declares(model, tensors):
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    assert len(config["layer_types"]) == config["num_hidden_layers"]
    assert tensors["lm_head.weight"].shape == (config["vocab_size"], hidden)
    assert tensors["model.layers.3.self_attn.q_proj.weight"].shape == (
        heads * config["head_dim"],
        hidden,
    )
    assert not any(name.startswith("model.layers.4.") for name in tensors)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {config["dtype"]}


def test_tokenizer_turns_harmonys_tokens_back_into_the_text(model, harmony):
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    for token, text in special.items():
        assert harmony.encode(text, allowed_special="all") == [token]
    vocabulary = {token: text for text, token in tokenizer["model"]["vocab"].items()}
    assert sorted([*vocabulary, *special])[:199_998] == list(range(199_998))
    # Each of the 256 bytes has one character, and the 256 tokens of one byte show which.
    byte_of = {}
    for token, text in vocabulary.items():
        if len(text) == 1:
            raw = harmony.decode([token], errors="surrogateescape")
            byte_of[text] = raw.encode("utf-8", errors="surrogateescape")
    assert len(byte_of) == 256
    text = "Grüße, 世界 🙂\n\tdef f(x): return x\u00a0# ok"
    pieces = "".join(vocabulary[token] for token in harmony.encode(text))
    assert b"".join(byte_of[character] for character in pieces).decode() == text


def test_second_run_touches_nothing(tiny_gpt_oss, model):
    def changed():
        return {path.name: path.stat().st_mtime_ns for path in [model, *model.iterdir()]}

    before = changed()
    assert set(before) == {"tiny", *FILES}
    assert tiny_gpt_oss.write(model) is False
    assert changed() == before


def test_damaged_model_is_replaced_by_the_same_bytes(tiny_gpt_oss, model, tmp_path):
    directory = tmp_path / "tiny"
    tiny_gpt_oss.write(directory)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").unlink()
    assert tiny_gpt_oss.write(directory) is True
    assert contents(directory) == contents(model)


def test_failed_run_leaves_nothing_behind(tiny_gpt_oss, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny_gpt_oss, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        tiny_gpt_oss.write(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_directory_with_other_files_is_refused_and_left_alone(tiny_gpt_oss, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt, which is not the model's"):
        tiny_gpt_oss.write(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_sentence_with_a_repeated_token_is_an_error(tiny_gpt_oss, harmony, monkeypatch):
    monkeypatch.setattr(tiny_gpt_oss, "SENTENCE", "This is what this is: it is what it is.")
    with pytest.raises(ValueError, match="word it without repetition"):
        tiny_gpt_oss.successors(harmony)
