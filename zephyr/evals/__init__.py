"""Evaluation: is the aligned model better, by how much, and can the judge be believed?

pairs.py    which held-out pairs a model's implicit reward ranks rightly
"""
