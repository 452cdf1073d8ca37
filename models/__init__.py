"""Fine-tuning with fused LoRA layers, run from a checkout: `python -m models.train`.

`train` tells the story of a run. It takes flags (`arguments`), rows of text (`data`), a pretrained
model (`loading`) and a way to fine-tune it (`methods`), trains (`trainer`), and leaves a run
directory behind (`result` says what is in it, `run_directory` writes it, `show` draws and prints).
A task is a row of `data.tasks.TASKS`, a method a row of `methods.METHODS`.

Rule: these modules import `lora_kernels`, and never `bench`.
"""
