# SPDX-License-Identifier: Apache-2.0
"""The official OpenAI client against the gateway, as any user's program would use it: openai_client.py BASE_URL."""

import asyncio
import sys

import openai

base = sys.argv[1]
client = openai.OpenAI(base_url=base, api_key="sk-test", max_retries=0, timeout=60)
long = "a long prompt that is worth a prefill elsewhere " * 20


def check(condition, what):
    if not condition:
        raise SystemExit("FAILED: " + what)
    print("ok", what)


models = client.models.list()
check("tiny" in [m.id for m in models.data], "models.list")

raw = client.chat.completions.with_raw_response.create(
    model="tiny", max_tokens=8, temperature=0, messages=[{"role": "user", "content": long}]
)
whole = raw.parse()
check(raw.headers.get("x-baton-outcome") == "disaggregated", "chat is disaggregated")
check(whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8, "chat")
text = whole.choices[0].message.content

pieces, usage = [], None
with client.chat.completions.create(
    model="tiny", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True},
    messages=[{"role": "user", "content": long}],
) as stream:
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [c.delta.content or "" for c in chunk.choices]
check("".join(pieces) == text, "the streamed chat says the same")
check(usage is not None and usage.completion_tokens == 8, "usage at the stream's end")

done = client.completions.create(model="tiny", prompt=long, max_tokens=4)
check(done.usage.completion_tokens == 4, "completions")

two = client.chat.completions.create(model="tiny", max_tokens=4, n=2, messages=[{"role": "user", "content": long}])
check(len(two.choices) == 2, "two choices")

response = client.responses.create(model="tiny", input=long, max_output_tokens=4)
check(response.usage.output_tokens == 4, "responses")

try:
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": long}], temperature=-7)
    check(False, "a bad parameter is refused")
except openai.BadRequestError as e:
    check("temperature" in str(e), "a bad parameter is refused")

try:
    client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": long}])
    check(False, "an unknown model is not found")
except openai.NotFoundError as e:
    check("nobody" in str(e), "an unknown model is not found")

# The picker's own errors are errors of the API too.
try:
    client.post("/chat/completions", body=None, cast_to=object, options={"headers": {"content-type": "application/json"}})
    check(False, "a request without a body is refused")
except openai.BadRequestError as e:
    check(True, "a request without a body is refused: " + str(e)[:80])


async def many():
    async with openai.AsyncOpenAI(base_url=base, api_key="sk-test", max_retries=0, timeout=60) as c:
        async def one(i):
            s = await c.chat.completions.create(
                model="tiny", max_tokens=8, temperature=0, stream=True, messages=[{"role": "user", "content": f"{i} {long}"}]
            )
            return "".join([c.choices[0].delta.content or "" async for c in s if c.choices])

        texts = await asyncio.gather(*(one(i) for i in range(20)))
        check(all(texts) and len(set(texts)) > 1, "20 streams at once")

        s = await c.chat.completions.create(
            model="tiny", max_tokens=30000, stream=True, messages=[{"role": "user", "content": long}]
        )
        async for _ in s:
            break
        await s.close()
        check(True, "a stream is left early")


asyncio.run(many())
print("all", openai.__version__)
