"""Ask from several asyncio tasks at once, and give up on one."""

import asyncio

from ernie45 import ErnieModel

QUESTIONS = ("What is 12 + 30?", "What is the capital of Peru?", "Reverse the word STONE.")


async def ask(model: ErnieModel, question: str) -> str:
    reply = await model.achat([{"role": "user", "content": question}], temperature=0)
    return reply.text


async def main(model: ErnieModel) -> None:
    answers = await asyncio.gather(*(ask(model, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(question, answer)

    # Cancelling a task, here by a timeout, cancels its reply within a step.
    long_reply = model.agenerate("One, two, ", max_new_tokens=model.context_tokens - 100, ignore_eos=True)
    try:
        await asyncio.wait_for(long_reply, timeout=0.05)
    except asyncio.TimeoutError:
        print("gave up on the long one")


with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
    asyncio.run(main(model))
