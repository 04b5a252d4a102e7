"""Show a reply as it is made, stop one early, and see what one cost."""

from ernie45 import ErnieModel

with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
    # A chunk comes for every token; the last one brings the usage.
    usage = None
    for chunk in model.stream_chat([{"role": "user", "content": "Write 347 in Chinese numerals."}], temperature=0):
        print(chunk.text, end="", flush=True)
        usage = chunk.usage
    assert usage is not None
    print(f"\n{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new tokens")

    # Leaving the `with` block, or the loop, cancels what is left of the reply.
    question = "Sort these numbers: 88, 7, 42, 19"
    with model.stream_chat([{"role": "user", "content": question}], temperature=0) as chunks:
        smallest = ""
        for chunk in chunks:
            smallest += chunk.text
            if "," in smallest:
                break
    print("smallest:", smallest.partition(",")[0])
