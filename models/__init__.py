"""Fine-tuning with fused LoRA layers, run from a checkout: `python -m models.train`.

Start with `run`, which tells a run from its flags (`arguments`) to its files (`run_directory`);
`train` is its command line. A run reads rows of text (`data`), loads a pretrained model (`loading`)
with a head for the task (`head`), attaches a method to it (`attach`, with `houlsby` and
`adaptive`), trains it (`trainer`, with `progress` and `meter`), lets a language model write
(`generation`), and describes all that in a result (`result`) that people can read (`show`). A run
that was cut off continues from its last whole checkpoint (`checkpoints`), if rows and model are
still the same (`digests`). A task is a row of `data.tasks.TASKS`, a method a row of
`methods.METHODS`.

A published experiment is a row of `recipes.RECIPES`: which runs, and what was printed. `sweep` runs
its cells, each one a run (`cells`), or says what they would take (`dry_run`, `estimate`); `bases`
makes what small forms need. `report` reads the runs into one table (`frame`), sets it beside what
was published, tests the claims (`compare`) and draws (`figures`). `results/` holds the report of
small forms.

Rule: this folder imports `lora_kernels` and never `bench`.
"""
