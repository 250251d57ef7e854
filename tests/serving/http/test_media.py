"""Images, recordings and videos in a conversation, as the official client sends them, with a model that has towers."""

import base64
import json

import openai
import pytest

import mimo_jax as mimo
from mimo_jax.generation import encode_prompt
from mimo_jax.media.parts import Audio, Image
from mimo_jax.serving.engine import Engine, Limits
from mimo_jax.serving.http.app import create_app
from mimo_jax.serving.http.service import Service
from mimo_jax.serving.template import ChatTemplate
from tests.media.models import model, mp4, png, wav
from tests.serving.http.scripted import serving

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n"
)


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    files = tmp_path_factory.mktemp("media")
    (files / "a.png").write_bytes(png(seed=3))
    (files.parent / "secret.png").write_bytes(png(seed=4))
    (files / "link.png").symlink_to(files.parent / "secret.png")
    with Engine(model(), Limits(slots=2, context=600)) as engine:
        service = Service.of(model(), engine, mimo.BUNDLED, "seeing", 600, files=files)
        service.template = ChatTemplate(TEMPLATE, model().tokenizer)
        yield service


@pytest.fixture(scope="module")
def client(service):
    with serving(create_app(service)) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client


def ask(client, *content, **fields):
    messages = [{"role": "user", "content": list(content)}]
    return client.chat.completions.create(
        **{"model": "seeing", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    )


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def test_a_picture_and_a_recording_stand_where_the_client_put_them(client):
    """The reply is what the library makes of the same pieces; usage counts their rows."""
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}}
    reply = ask(client, text("See "), image(data_url(png())), text(" and hear "), sound, text("<|im_end|>"))
    encode = model().tokenizer.encode
    pieces = [encode("<|im_start|>user\nSee "), Image(png()), encode(" and hear "), Audio(wav())]
    pieces += [encode("<|im_end|>", literal=True), encode("<|im_end|><|im_start|>assistant")]
    expected = mimo.generate(model(), pieces, max_tokens=8)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.prompt_tokens == len(encode_prompt(model(), pieces).ids)
    details = reply.usage.prompt_tokens_details.model_dump()
    assert (details["image_tokens"], details["audio_tokens"]) == (8, 2)


def test_a_picture_that_was_seen_is_not_read_anew(client):
    asked = [text("x"), image(data_url(png(320, 320, 5))), text("What is this?")]
    first, second = (ask(client, *asked) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0 and second.usage.prompt_tokens_details.cached_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def test_videos_and_named_files_are_read(client):
    """A file below the folder that the server was started with."""
    video = {"type": "video_url", "video_url": {"url": data_url(mp4(), "video/x-matroska")}}
    assert ask(client, video).usage.prompt_tokens_details.model_dump()["video_tokens"] == 48
    named, sent = ask(client, image("file:a.png")), ask(client, image(data_url(png(seed=3))))
    assert named.choices[0].message.content == sent.choices[0].message.content


WHERE = "messages[0].content[0].image_url.url"
REFUSED = {
    "fetching": (image("https://example.org/a.png"), f"{WHERE}='https://example.org/a.png' must be a data: URL"),
    "outside": (image("file:../secret.png"), f"{WHERE}: the file is not below the folder"),
    "absolute": (image("file:///etc/passwd"), f"{WHERE}: the file is not below the folder"),
    "by a link": (image("file:link.png"), f"{WHERE}: the file is not below the folder"),
    "not base64": (image("data:image/png;base64,@@"), f"{WHERE}: not valid base64"),
    "not in base64": (image("data:image/png,abc"), f"{WHERE}: a data: URL must be in base64"),
    "no picture": (image(data_url(b"hello")), f"{WHERE}: not a picture that is read"),
    "no url": ({"type": "image_url", "image_url": "x"}, "messages[0].content[0].image_url='x' must be an object"),
    "too long": (image(data_url(png(500, 500))), "tokens; it and the reply may have 600 together"),
    "unknown": ({"type": "file"}, "messages[0].content[0].type='file' must be 'text' or 'image_url' or 'input_audio'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(client, case):
    """In one line that names the field; nothing outside of the folder is opened."""
    part, message = case
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, part, part, part)
    assert message in json.loads(error.value.response.content)["error"]["message"]


def test_too_many_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="33 images, recordings and videos; at most 32"):
        ask(client, *[image(data_url(png(32, 32)))] * 33)


def test_tokens_are_counted_without_running_towers(client, service):
    body = {"messages": [{"role": "user", "content": [image(data_url(png()))]}]}
    reply = client.post("/../tokenize", body=body, cast_to=dict)
    assert reply["count"] == len(reply["tokens"]) and 4096 in reply["tokens"]
