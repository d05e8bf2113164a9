import pytest


async def test_text_is_turned_into_tokens_and_back(http, text):
    answer = (await http.post("/tokenize", json={"prompt": "héllo🙂"})).json()
    assert answer == {"count": 10, "max_model_len": 200, "tokens": text.encode("héllo🙂"), "token_strs": None}
    back = await http.post("/detokenize", json={"tokens": answer["tokens"], "model": "tiny"})
    assert back.json() == {"prompt": "héllo🙂"}


async def test_a_chat_is_tokenized_with_or_without_the_start_of_an_answer(http, text):
    messages = [{"role": "user", "content": "hi"}]
    full = (await http.post("/tokenize", json={"messages": messages, "return_token_strs": True})).json()
    short = (await http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert text.decode(full["tokens"][short["count"] :], skip_special=False) == "<|im_start|>assistant\n"
    assert full["token_strs"][0] == "<|im_start|>"


async def test_text_longer_than_the_inline_bound_gives_the_same_tokens(http, text):
    long_text = "ab🙂" * 3_000
    assert (await http.post("/tokenize", json={"prompt": long_text})).json()["tokens"] == text.encode(long_text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 201}, "tokens"),
    ],
)
async def test_bad_input_is_refused_by_name(http, path, body, param):
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
