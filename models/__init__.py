"""Fine-tuning with fused LoRA layers, run from a checkout: `python -m models.train`.

Start with `run`, which tells a run from its flags (`arguments`) to its files (`run_directory`);
`train` is its command line. A run reads rows of text (`data`), loads a pretrained model (`loading`)
with a head for the task (`head`), attaches a method to it (`attach`, with `houlsby` and
`adaptive`), trains it (`trainer`, with `progress` and `meter`), and describes all that in a result
(`result`) that people can read (`show`). A run that was cut off continues from its last whole
checkpoint (`checkpoints`), if rows and model are still the same (`digests`). A task is a row of
`data.tasks.TASKS`, a method a row of `methods.METHODS`.

Rule: this folder imports `lora_kernels` and never `bench`.
"""
