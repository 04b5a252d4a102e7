"""Answer many questions in one call, then questions with options of their own."""

from ernie45 import ErnieModel
from ernie45.testing import tasks

NUM_QUESTIONS = 20

with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
    questions = tasks("facts", NUM_QUESTIONS, seed=1, split="test")
    replies = model.batch_chat([question.messages for question in questions], temperature=0)
    num_right = sum(reply.text == question.answer for reply, question in zip(replies, questions, strict=True))
    print(f"{num_right} of {NUM_QUESTIONS} right")

    # A prompt may bring options; those of the call serve the rest. `render` makes prompts of messages.
    capital = model.render([{"role": "user", "content": "What is the capital of Japan?"}])
    sorting = model.render([{"role": "user", "content": "Sort these numbers: 31, 4, 15, 92"}])
    completions = model.batch_generate([capital, {"prompt": sorting, "stop": ","}], temperature=0)
    for completion in completions:
        print(completion.text, f"({completion.finish_reason})")
