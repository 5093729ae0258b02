"""The forgetting benchmark on real models and data: ``python -m benchmarks.forgetting real --help``.

metrics.py    predictions and references -> a score in percent
sources.py    a data set, from the hub or a folder -> rows
tasks.py      rows -> examples with prompts; every task by name
subject.py    a model with its processor: batches of examples, answers
vila.py       the same for NVILA, whose own code speaks another language
runs.py       one run, from settings to a row
command.py    the command line
report.py     rows -> table
"""
