"""A run: what it leaves on the disk, and how it ends.

settings.py     settings that the machine decides: precision, micro-batch, recomputation
folder.py       the run folder: whose it is, what it resumes from, when it is saved
checkpoint.py   checkpoints, sharded and asynchronous
guard.py        losses and gradients that are not finite, and spikes
exits.py        every command's last line and exit code
"""
