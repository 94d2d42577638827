"""The embedded default: data for the whole recipe, made here, with a judge that knows the truth.

village.py   Larkmere: what there is, what one can ask about it, and a judge of any reply
birds.py     four birds that answer, well or badly, and the files made of what they say
serve.py     the judge as an OpenAI-compatible endpoint

    python -m zephyr.toy FOLDER [--seed N]
    python -m zephyr.toy serve [--port N]
"""
