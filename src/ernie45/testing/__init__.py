"""For tests of code that uses ernie45: a model with scripted replies, and the tasks the built-in models can do."""

from ernie45.testing.scripted import scripted_model
from ernie45.testing.tasks import Task, task_names, tasks

__all__ = ["Task", "scripted_model", "task_names", "tasks"]
