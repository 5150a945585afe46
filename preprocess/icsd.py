#!/usr/bin/env python
"""A store from CIF files exported from the ICSD: symmetry operations, partial occupancy, collection codes as ids.

About 46 % of the ICSD's entries are partially occupied; --disorder says what becomes of them, and the counts are
reported. An entry whose collection code was met before is refused as duplicate-id.

python preprocess/icsd.py icsd_export/ --disorder order:3 --out stores/icsd
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cif_folder import CifFiles, Span, main

from hpcgen.store.layout import ColumnSpec
from hpcgen.store.source import Raw, Value

CODE = re.compile(rb"(?mi)^_database_code_ICSD\s+['\"]?(\d+)")
QUOTED = re.compile(rb"'[^'\n]*'|\"[^\"\n]*\"")  # journals' names hold years
YEAR = re.compile(rb"(?m)^\s*primary\s+.*?\b((?:18|19|20)\d\d)\b")
TEMPERATURE = re.compile(rb"(?mi)^_(?:cell_measurement|diffrn_ambient)_temperature\s+['\"]?(\d+(?:\.\d*)?)")
SPECS = {
    "publication_year": ColumnSpec("int"),
    "temperature": ColumnSpec("float", "K"),
}


@dataclass
class IcsdFiles(CifFiles):
    """CIF files of the ICSD; the id is `icsd-` and the collection code, or the file's name where there is none."""

    name: str = "icsd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.columns: dict[str, ColumnSpec] = {**self.columns, **SPECS}

    def _raw(self, file: Path, span: Span) -> Raw:
        raw = super()._raw(file, span)
        code, kelvin = CODE.search(raw.body), TEMPERATURE.search(raw.body)
        year = YEAR.search(QUOTED.sub(b"", raw.body))
        found: dict[str, Value] = {
            "publication_year": int(year.group(1)) if year else None,
            "temperature": float(kelvin.group(1)) if kelvin else None,
        }
        name = f"icsd-{code.group(1).decode()}" if code else raw.id
        return Raw(name, raw.body, {**raw.columns, **found}, raw.split, raw.fault)


if __name__ == "__main__":
    sys.exit(main(IcsdFiles, __doc__))
