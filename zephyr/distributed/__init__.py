"""One model on many ranks, and the machine under each of them.

group.py     the process group: joining it, and what its ranks decide together
fsdp.py      the model over the ranks: FSDP2, recomputation, torch.compile
compiled_attention.py   attention on a CPU, as one op to torch.compile
lost.py      what a rank that died, or is silent, looks like to the others
signals.py   SIGTERM and SIGUSR1 ask a run to stop
machine.py   memory, bf16 arithmetic, allocators
"""
