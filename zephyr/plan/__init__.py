"""What a run takes, before it is started: bytes, FLOPs, hours. No file here needs torch.

costs.py   closed forms for one micro-batch or one step
fit.py     the largest micro-batch that fits a memory
job.py     a run on so many GPUs of a kind
page.py    the page that is printed

    python -m zephyr.plan zephyr-7b-dpo --gpu h200
"""
