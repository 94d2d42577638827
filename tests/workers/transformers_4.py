"""Whether transformers 4 gives our ids: transformers_4.py ITS_FOLDER ROOT TESTS MODEL < CHATS"""

import json
import sys

sys.path.insert(0, sys.argv[1])
import transformers

sys.path.extend(sys.argv[2:4])
from test_exported import compare

from zephyr.tokenizer import Tokenizer

assert transformers.__version__.startswith("4.57."), transformers.__version__
theirs = transformers.AutoTokenizer.from_pretrained(sys.argv[4])
compare(theirs, Tokenizer(sys.argv[4]), json.load(sys.stdin))
print("equal")
