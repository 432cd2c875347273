"""The task that a recipe names: bundled, read from files, or the user's own."""

from __future__ import annotations

from actors.reward.worker import load_function, user_code
from pipeline.data.config import DataConfig
from pipeline.tasks.task import Task

TASKS = {
    "smalltalk": "pipeline.tasks.smalltalk:SmallTalk",
    "twenty-questions": "pipeline.environments.twenty_questions.task:TwentyQuestionsTask",
    "walks": "pipeline.tasks.walks:RandomWalks",
    "world": "pipeline.environments.world.task:WorldTask",
    "world-conversations": "pipeline.environments.world.task:WorldConversations",
    "world-options": "pipeline.environments.world.task:WorldOptions",
}
FILES = "files"  # the task that is read from the sources under `data` of the recipe


def load_task(name: str, data: DataConfig | None = None, model: str = "") -> Task:
    """A task by its name in `TASKS`, or by import path.

    data, model: for the task "files", the recipe's sources, and the folder or hub name of the model, whose chat
    template lays them out if it has one. Raises ValueError naming the choices, or the reason why the task cannot be
    constructed.
    """
    if name == FILES:
        from pipeline.data.files import Files  # imports what only this task needs

        return Files(data or DataConfig(), model)
    if name not in TASKS and ":" not in name:
        raise ValueError(
            f"task: must be one of {', '.join([*TASKS, FILES])} or an import path package.module:name, got {name!r}"
        )
    make = load_function(TASKS.get(name, name), field="task")
    with user_code(f"task: must be a class without arguments, got {name!r}"):
        task = make()
    if not isinstance(task, Task):
        lacking = [
            member
            for member in ("name", "reward", "build_tokenizer", "demonstrations", "prompts", "layout")
            if not hasattr(task, member)
        ]
        raise ValueError(
            f"task: must make a Task, got {name!r} without {', '.join(lacking)}; see pipeline/tasks/task.py"
        )
    return task
