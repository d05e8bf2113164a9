"""Whatever way a context arrives, the router answers the tokens of the whole text, and no other."""

import asyncio
import contextlib
import dataclasses
import random

import pytest

from headrace import AsyncClient, HeadraceError
from headrace.cli.layout import bundled_model
from headrace.clock import WallClock
from headrace.testing.ingestor import open_ingestor, serve_frontend
from headrace.testing.text import byte_text_model
from headrace.text.model import TextModel
from headrace.text.source import read_source

pytestmark = pytest.mark.cpu

WORDS = (
    "the don't we'll I'M they'RE '' 's 'll 12 3456 3.14 _x f(x): ** ... ?! \r\n \n \n\n \t \u3000 \u00a0 ( ) SHOUT "
    "naïve e\u0301 =\u0338 中文 字。 、日 한국 각 🙂 👩‍👩‍👧 <| <|im <|im_ end|> <|im_end|> <|im_start|> |> "
    "\u2028 ﬁ Ⅻ a \u0300"
).split(" ")
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant"}]
SYSTEM[2]["content"] = "Hello."

CONTENT = "messages[-1]['content']"
HEAD = "{% for message in messages[:-1] %}{{ message['content'] }}\n{% endfor %}"
TEMPLATES = {
    "trims": f"{HEAD}user: {{{{ {CONTENT} | trim }}}}\nassistant:",
    "twice": f"{HEAD}{{{{ {CONTENT} }}}} -- again: {{{{ {CONTENT} }}}}\nassistant:",
    "changed and raw": f"{HEAD}{{{{ {CONTENT} | upper }}}} -- {{{{ {CONTENT} }}}}\nassistant:",
    "depends on a word": f"{HEAD}{{% if 'SHOUT' in {CONTENT} %}}LOUD: {{{{ {CONTENT} | upper }}}}"
    f"{{% else %}}quiet: {{{{ {CONTENT} }}}}{{% endif %}}\nassistant:",
    "counts": f"{HEAD}{{{{ {CONTENT} | wordcount }}}} words: {{{{ {CONTENT} }}}}\nassistant:",
    "escapes": f"{HEAD}{{{{ {CONTENT} | tojson }}}}\nassistant:",
    "shows the beginning": f"{HEAD}{{{{ {CONTENT}[:40] }}}}\nassistant:",
}
STEADY = {"trims", "twice", "escapes", "shows the beginning"}
"""What they make of a beginning stays, up to a space at the end."""


class Script:
    """One context in random pieces, and what it must become."""

    def __init__(self, seed, mode):
        self.rng, self.mode = random.Random(f"{seed} {mode}"), mode
        self.segments, self.num_segments = [], 0
        self.query = self.words(4)

    def words(self, most):
        spaces = ["", " ", " ", "  "]
        return "".join(self.rng.choice(WORDS) + self.rng.choice(spaces) for _ in range(self.rng.randint(0, most)))

    @property
    def text(self):
        return "".join(text for _, text in self.segments)

    def new_segment(self):
        self.num_segments += 1
        return (f"s{self.num_segments}", self.words(12))

    async def run(self, context):
        for _ in range(self.rng.randint(1, 8)):
            kind = self.rng.choice(["append", "append", "update", "replace"] if self.mode == "update" else ["append"])
            await getattr(self, f"_{kind}")(context)
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.random() / 200)
            if self.rng.random() < 0.2:
                with pytest.raises(HeadraceError):
                    await context.append(self.rng.choice([b"\xff", b"\x80", b"x\xed\xa0"]), "refused")
        return await context.close(self.query).answer()

    async def _append(self, context):
        segment, text = self.new_segment()
        if self.segments and self.rng.random() < 0.4:
            segment, before = self.segments.pop()
            self.segments.append((segment, before + text))
        else:
            self.segments.append((segment, text))
        raw = text.encode()
        places = sorted(self.rng.randint(0, len(raw)) for _ in range(self.rng.randint(0, 6)))
        for start, end in zip([0, *places], [*places, len(raw)], strict=True):
            await context.append(raw[start:end], segment)

    async def _update(self, context):
        kept = [each for each in self.segments if self.rng.random() < 0.7]
        self.segments = [*kept, *(self.new_segment() for _ in range(self.rng.randint(0, 3)))]
        await context.update(self.segments)

    async def _replace(self, context):
        if self.segments:
            first = self.rng.randrange(len(self.segments))
            new = [self.new_segment() for _ in range(self.rng.randint(0, 2))]
            start = self.segments[first][0]
            self.segments = [*self.segments[:first], *new]
            await context.replace(start, new)


@pytest.fixture(scope="session")
def smollm2():
    model = TextModel.load(bundled_model())
    return model, model.cuts()


@pytest.fixture
def ingested(make_frontend):
    """Runs scripts at once and checks what the router answers; returns how it saw their contexts."""

    async def run(model, cuts, scripts, prefix="", chat=None):
        frontend = make_frontend(model=model, num_tokens=100_000)
        async with contextlib.AsyncExitStack() as stack:
            router = await stack.enter_async_context(serve_frontend(frontend))
            ingestor = await stack.enter_async_context(
                open_ingestor(model, [router.address], cuts=cuts, coalesce_s=0.001)
            )
            client = await stack.enter_async_context(AsyncClient(ingestor.address, timeout_s=60.0))

            async def one(name, script):
                async with client.context(prefix, chat=chat, mode=script.mode, request_id=name) as context:
                    assert (await script.run(context)).text == "abc"

            await asyncio.gather(*(one(f"r{index}", script) for index, script in enumerate(scripts)))
            await ingestor.at_rest()
        prompts = {request.request_id.partition(".")[0]: request.prompt for request in frontend.requests}
        for index, script in enumerate(scripts):
            whole = script.text + script.query
            tokens = model.encode(prefix + whole) if chat is None else model.chat_tokens([*chat, user(whole)])
            assert prompts[f"r{index}"] == tuple(tokens), f"script {index}"
        return frontend.contexts

    return run


def user(text):
    return {"role": "user", "content": text}


def scripts_of(mode, count):
    return [Script(seed, mode) for seed in range(count)]


@pytest.mark.parametrize("mode", ["append", "update"])
@pytest.mark.parametrize("chat", [None, [], SYSTEM], ids=["plain", "user only", "chat"])
async def test_bytes_in_pieces_have_the_tokens_of_the_whole(ingested, text, cuts, mode, chat):
    prefix = "Before: é " if chat is None else ""
    contexts = await ingested(text, cuts, scripts_of(mode, 25), prefix, chat)
    assert len(contexts) == 25


@pytest.mark.parametrize("mode", ["append", "update"])
@pytest.mark.parametrize("chat", [None, SYSTEM], ids=["plain", "chat"])
async def test_a_real_model_gets_the_tokens_of_the_whole(ingested, smollm2, mode, chat):
    prefix = "You are here. They" if chat is None else ""
    contexts = await ingested(*smollm2, scripts_of(mode, 25), prefix, chat)
    assert len(contexts) == 25


@pytest.mark.parametrize("mode", ["append", "update"])
@pytest.mark.parametrize("template", TEMPLATES)
async def test_whatever_a_template_does_with_the_context_its_tokens_are_those_of_the_whole(
    ingested, cuts, tmp_path, template, mode
):
    model = TextModel(_source_of(tmp_path, TEMPLATES[template]), WallClock())
    contexts = await ingested(model, cuts, scripts_of(mode, 12), chat=SYSTEM)
    if template in STEADY - {"trims"}:
        assert len(contexts) == 12


async def test_a_real_model_with_a_template_that_changes_its_head_gets_the_tokens_of_the_whole(ingested, smollm2):
    source = dataclasses.replace(read_source(bundled_model()), chat_template=TEMPLATES["depends on a word"])
    model = TextModel(source, WallClock())
    contexts = await ingested(model, smollm2[1], scripts_of("append", 25), chat=SYSTEM)
    assert len(contexts) > 25


async def test_a_template_that_drops_what_was_said_to_stay_is_followed(ingested, cuts, tmp_path):
    template = f"{{% if 'SHOUT' not in {CONTENT} %}}A long beginning. {{% endif %}}{{{{ {CONTENT} }}}}"
    model = TextModel(_source_of(tmp_path, template), WallClock())
    script = Script(0, "update")
    script.segments, script.query = [("c", "quiet ")], "?"

    async def run(context):
        for name, word in (("a", "one "), ("b", "SHOUT "), ("c", "quiet ")):
            await context.update([(name, word)])
            await context.checkpoint()
        return await context.close("?").answer()

    script.run = run
    contexts = await ingested(model, cuts, [script], chat=[])
    shown = [model.decode(each.versions[-1], skip_special=False) for each in contexts]
    assert shown[:2] == ["A long beginning. one", "SHOUT"]


async def test_what_a_template_shows_of_a_context_that_goes_on_is_sent_before_it_is_closed(ingested, tmp_path, cuts):
    for name in sorted(STEADY):
        model = TextModel(_source_of(tmp_path / name, TEMPLATES[name]), WallClock())
        script = Script(0, "append")
        script.run = _three_words
        script.segments, script.query = [("s", "one two three ")], "?"
        [arrival] = (await ingested(model, cuts, [script], chat=SYSTEM))[-1:]
        open_text = model.decode(arrival.versions[-2], skip_special=False)
        assert open_text.endswith("one two three"), name


async def _three_words(context):
    await context.append("one two three ", "s")
    await context.checkpoint()
    return await context.close("?").answer()


def _source_of(folder, template):
    byte_text_model(folder)
    return dataclasses.replace(read_source(folder), chat_template=template)
