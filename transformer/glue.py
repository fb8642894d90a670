"""The public names of GLUE: tasks and their rows, and rows turned into model input."""

from transformer.features import Features, encode_examples, load_features
from transformer.table_files import read_tsv, write_tsv
from transformer.tasks import GLUE_TASKS, Example, Task, get_task, label_order, load_examples

__all__ = ["GLUE_TASKS", "Example", "Features", "Task", "encode_examples", "get_task",
           "label_order", "load_examples", "load_features", "read_tsv", "write_tsv"]
