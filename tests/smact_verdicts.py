"""Verdicts of the SMACT that this interpreter finds: compositions as JSON on standard input, verdicts on the output.

A composition is {symbol: count}; the one argument names the table of oxidation states, '' for the version's default.
"""

import json
import sys

from smact.screening import smact_validity

compositions, table = json.load(sys.stdin), sys.argv[1] or None
texts = ["".join(f"{symbol}{count}" for symbol, count in one.items()) for one in compositions]
print(json.dumps([bool(smact_validity(text, oxidation_states_set=table)) for text in texts]))
