"""Fine-tuning with fused LoRA layers, run from a checkout: `python -m models.train`.

Start with `run`, which tells a run from its flags (`arguments`) to its files; `train` is its
command line. A run reads rows of text (`data`), loads a pretrained model with a head for the task
and attaches a method to it (`model`), trains it (`training`), and leaves a directory with a result
that people can read (`record`). A run that was cut off continues from its last whole checkpoint,
if rows and model are still the same. A task is a row of `data.tasks.TASKS`, a method a row of
`methods.METHODS`.

A published experiment is a row of `recipes.RECIPES`: which runs, and what was printed. `sweep` runs
its cells, each one a run, or says what they would take (`sweeping`). `report` reads the runs into
one table, sets it beside what was published, tests the claims and draws (`reporting`). `results/`
holds the report of small forms.

Rule: this folder imports `lora_kernels` and never `bench`.
"""
