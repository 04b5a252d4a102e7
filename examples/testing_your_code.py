"""Test code that uses a model, without weights: the model says what the test tells it to. Runs alone or by pytest."""

from ernie45 import ErnieModel
from ernie45.testing import scripted_model


def translate(model: ErnieModel, text: str) -> str:
    """The code under test: asks once more when the reply is empty."""
    for _ in range(2):
        reply = model.chat([{"role": "user", "content": f"Translate to French: {text}"}], max_new_tokens=100)
        if reply.text:
            return reply.text
    raise ValueError(f"no translation of {text!r}")


def test_a_reply_is_the_translation() -> None:
    assert translate(scripted_model(["Bonjour"]), "Good morning") == "Bonjour"


def test_an_empty_reply_is_asked_for_again() -> None:
    assert translate(scripted_model(["", "Bonjour"]), "Good morning") == "Bonjour"


if __name__ == "__main__":
    test_a_reply_is_the_translation()
    test_an_empty_reply_is_asked_for_again()
    print("2 tests passed")
