"""Plain scalars that YAML readers quarrel about; the right reading is kubectl's, asked in tests/cluster."""

from __future__ import annotations

_WORDS = """
1e-5 1E5 1e+5 1.5e3 1e400x .5 5. -.5 1_000 1_000.5 0x1F 0o17 017 08 0b101 -0x10 +7 -7 0 00 1:30 12:30:45 2024-01-01
2024-01-01T00:00:00Z yes no on off Yes NO y n Y N true True TRUE tRUE false ~ null Null NULL nULL 'yes' "1e-5" 1.2.3
1e e5 0.0 1.0 64.0 1e3 1e21 0.1 = 8Gi 500m 1,000 infinity nan + . 1__0 0x 0b2 0o8 _1 1_ -0 +0x1F 0. 1.e2 -1e-5
"""
SCALARS = (*_WORDS.split(), "a - 1", "", "1 000")
