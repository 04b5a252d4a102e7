"""The README's demo: load the built-in model, stream a chat answer, run a batch, print what it cost."""

from ernie45 import ErnieModel

with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
    print(model)

    question = "What is 12 + 30?"
    print(f"\n{question} ", end="")
    for chunk in model.stream_chat([{"role": "user", "content": question}], temperature=0):
        print(chunk.text, end="", flush=True)
    print()

    questions = [
        "What is the capital of France?",
        "Reverse the word PLANET.",
        "Sort these numbers: 42, 7, 93, 15",
    ]
    replies = model.batch_chat([[{"role": "user", "content": question}] for question in questions], temperature=0)
    for question, reply in zip(questions, replies, strict=True):
        print(f"{question} {reply.text}")

    usage = replies[0].usage
    print(
        f"\nThe first of these: {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new tokens,",
        end=" ",
    )
    print(f"first one after {1000 * (usage.seconds_to_first_token or 0):.0f} ms.")
