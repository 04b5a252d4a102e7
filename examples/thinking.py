"""A model that thinks: its reasoning and its answer come apart, in streams as well, and reasoning can be limited."""

from ernie45 import ErnieModel

question = {"role": "user", "content": "What is 12 + 30 + 9?"}

with ErnieModel.from_pretrained("ernie45/tiny-moe") as model:
    reply = model.chat([question], temperature=0)
    print(f"reasoning: {reply.reasoning}\nanswer: {reply.text}")

    for chunk in model.stream_chat([question], temperature=0):
        print(f"({chunk.reasoning})" if chunk.reasoning else chunk.text, end="", flush=True)

    # reply.message holds the reasoning too; the template leaves it out once there is a new question.
    history = [question, reply.message, {"role": "user", "content": "What is 25 + 14 + 7?"}]
    print(f"\nnext prompt: {len(model.render(history))} tokens, next answer: {model.chat(history, temperature=0).text}")

    hasty = model.chat([question], thinking_budget=4, temperature=0)
    print(f"after 4 tokens of reasoning ({hasty.reasoning}): {hasty.text}")
