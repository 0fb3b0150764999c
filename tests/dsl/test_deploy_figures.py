"""Mistakes in devices, clusters and number formats, each with its whole message."""

import pytest
from deploy_toy import messages

CASES = {
    "unit": (
        """
device D {
  memory = 80 Gigabyte "data sheet, 2023"
}
""",
        """
error[E0801]: 'Gigabyte' is no unit
  --> case.arch:3:12
  |
3 |   memory = 80 Gigabyte "data sheet, 2023"
  |            ^^^^^^^^^^^
  hint: write it like 80 GB
""",
    ),
    "measure": (
        """
device D {
  memory = 80 GB/s "data sheet, 2023"
}
""",
        """
error[E0801]: 'memory' is an amount of memory, and 'GB/s' measures a bandwidth
  --> case.arch:3:12
  |
3 |   memory = 80 GB/s "data sheet, 2023"
  |            ^^^^^^^
  hint: write it like 80 GB
""",
    ),
    "no_unit": (
        """
device D {
  peak[bf16] = 989 "data sheet, 2023"
}
""",
        """
error[E0801]: 'peak[bf16]' has no unit
  --> case.arch:3:16
  |
3 |   peak[bf16] = 989 "data sheet, 2023"
  |                ^^^
  hint: write it like 989 TFLOPS
""",
    ),
    "source": (
        """
device D {
  memory = 80 GB
}
""",
        """
error[E0802]: 'memory' has no source
  --> case.arch:3:3
  |
3 |   memory = 80 GB
  |   ^^^^^^^^^^^^^^
  hint: say where it is from, and when: memory = 80 GB "NVIDIA data sheet, 2023"
""",
    ),
    "year": (
        """
device D {
  memory = 80 GB "data sheet"
}
""",
        """
error[E0802]: 'memory' has no year in its source
  --> case.arch:3:18
  |
3 |   memory = 80 GB "data sheet"
  |                  ^^^^^^^^^^^^
  hint: say where it is from, and when: memory = 80 GB "NVIDIA data sheet, 2023"
""",
    ),
    "figure": (
        """
device D {
  memry = 80 GB "data sheet, 2023"
}
""",
        """
error[E0803]: a device has no figure 'memry'
  --> case.arch:3:3
  |
3 |   memry = 80 GB "data sheet, 2023"
  |   ^^^^^
  hint: did you mean 'memory'?
""",
    ),
    "format_of_peak": (
        """
device D {
  peak[b16] = 989 TFLOPS "data sheet, 2023"
}
""",
        """
error[E0806]: no number format is called 'b16'
  --> case.arch:3:8
  |
3 |   peak[b16] = 989 TFLOPS "data sheet, 2023"
  |        ^^^
  hint: did you mean 'bf16'?
""",
    ),
    "rate_key": (
        """
device D {
  rate[gem, bf16] = 70% "measured, 2025"
}
""",
        """
error[E0803]: 'gem' is no class of kernels
  --> case.arch:3:8
  |
3 |   rate[gem, bf16] = 70% "measured, 2025"
  |        ^^^
  hint: did you mean 'gemm'?
""",
    ),
    "zero": (
        """
device D {
  peak[scale_out] = 0 GB/s "measured, 2025"
}
""",
        """
error[E0805]: 'peak[scale_out]' must be above 0
  --> case.arch:3:21
  |
3 |   peak[scale_out] = 0 GB/s "measured, 2025"
  |                     ^^^^^^
""",
    ),
    "above_peak": (
        """
device D {
  peak[bf16] = 989 TFLOPS "data sheet, 2023"
  rate[gemm, bf16] = 1 PFLOPS "measured, 2025"
}
cluster c { gpu = D, per_node = 1, nodes = 1 }
""",
        """
error[E0805]: 'rate[gemm, bf16]' is above its peak
  --> case.arch:4:3
  |
4 |   rate[gemm, bf16] = 1 PFLOPS "measured, 2025"
  |   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ 1 PFLOPS
  ::: case.arch:3:3
  |
3 |   peak[bf16] = 989 TFLOPS "data sheet, 2023"
  |   ------------------------------------------ 989 TFLOPS
""",
    ),
    "no_network": (
        """
device D { }
cluster c { gpu = D, per_node = 1, nodes = 2 }
""",
        """
error[E0804]: cluster 'c' does not say how fast its network is
  --> case.arch:3:9
  |
3 | cluster c { gpu = D, per_node = 1, nodes = 2 }
  |         ^
  hint: peak[scale_out] = 50 GB/s "where, when"
""",
    ),
    "no_device": (
        """
cluster c { gpu = H900, per_node = 1, nodes = 1 }
device H800 { }
""",
        """
error[E0806]: no device is called 'H900'
  --> case.arch:2:19
  |
2 | cluster c { gpu = H900, per_node = 1, nodes = 1 }
  |                   ^^^^
  hint: did you mean 'H800'?
""",
    ),
    "own_base": (
        """
device A from B { }
device B from A { }
""",
        """
error[E0808]: device 'A' inherits from itself
  --> case.arch:2:15
  |
2 | device A from B { }
  |               ^ A from B from A
""",
    ),
    "format": (
        """
format tiny { exponent = 2 }
""",
        """
error[E0807]: 'tiny' does not say how an element is stored
  --> case.arch:2:8
  |
2 | format tiny { exponent = 2 }
  |        ^^^^
  hint: exponent = 4, fraction = 3 or integer = 4
""",
    ),
    "format2": (
        """
format tiny { exponent = 2, fraction = 1, tile = 1 x 32 }
""",
        """
error[E0807]: 'tiny' has no scale, so it has no tile
  --> case.arch:2:43
  |
2 | format tiny { exponent = 2, fraction = 1, tile = 1 x 32 }
  |                                           ^^^^^^^^^^^^^
  hint: scale = f32
""",
    ),
    "format3": (
        """
format tiny from e4m3 { rounding = exponents }
""",
        """
error[E0807]: 'exponents' makes scales that are powers of two, and these are 'f32'
  --> case.arch:2:25
  |
2 | format tiny from e4m3 { rounding = exponents }
  |                         ^^^^^^^^^^^^^^^^^^^^
  hint: scale = ue8m0
""",
    ),
    "format4": (
        """
format tiny from e4m3 { tile = 0 x 32 , roundin = up }
""",
        """
error[E0805]: the sides of a tile must be 1 to 1,048,576, or all
  --> case.arch:2:32
  |
2 | format tiny from e4m3 { tile = 0 x 32 , roundin = up }
  |                                ^^^^^^
error[E0803]: a number format has no 'roundin'
  --> case.arch:2:41
  |
2 | format tiny from e4m3 { tile = 0 x 32 , roundin = up }
  |                                         ^^^^^^^^^^^^
  hint: did you mean 'rounding'?
""",
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_the_whole_message(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert messages(text) == expected
