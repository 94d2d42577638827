"""Model folders, as Hugging Face has them, in and out.

locate.py             which files of a folder are a model's; if there is none, what it is instead
config_json.py        config.json and the tokenizer's settings
tokenizer_json.py     the tokenizer.json that gives the ids of training
base.py               what the folder that a run starts from holds besides weights
safetensor_files.py   tensors in files
hub.py                load a model a tensor at a time, save it a file at a time; sharded or not
masters.py            fp32 masters, whole or in two halves
adapter.py            LoRA adapters in PEFT's files
mistral.py            from the layout that Mistral publishes

    python -m zephyr.weights SOURCE TARGET     makes such a folder of a checkpoint, of a LoRA
                                               adapter and its base, or of Mistral's
"""
