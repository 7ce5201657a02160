"""The figures of the paper's Tables 1 to 6, in per cent and seconds, as data.

`paper.md` is the paper as text that was read from its pages, with slips; a test compares these
figures with it. How each slip was read: "84.101" and "83.495", "99.687" of Table 5 are printed with
three digits and rounded here; its row label "2300" beside "2500" is a slip of the reading.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """ACC and ASR in per cent; None in both: the paper's ×, no trigger was detected."""

    acc: float | None
    asr: float | None


DETECTED_NONE = Figure(None, None)
BASELINES = ("neural-cleanse", "deepinspect", "tabor", "fine-pruning", "nad", "dp-sgd")
GTSRB_BASELINES = ("tabor", "fine-pruning", "nad", "dp-sgd")  # of Table 2

# Columns of each table, in its order; a line holds ACC and ASR of each.
COLUMNS = {
    "table1": ("none", *BASELINES, "ibau"),
    "table2": ("none", *GTSRB_BASELINES, "ibau"),
    "table3": ("none", *BASELINES, "ibau"),
    "table4": ("none", *BASELINES, "ibau"),
    "table5": ("none", *BASELINES[:-1], "ibau"),
}
# A case of a table is a model of the zoo, with the number of clean images where it is not 5000.
_LINES = {
    "table1": """
cifar10-badnets           84.94 98.28 83.42  8.76 82.12 48.50 83.78  8.12 82.22  96.66 78.72 11.66 11.08 21.77 83.35 12.30
cifar10-blend             84.82 99.78 83.08 33.96 81.84 52.62 83.42 21.26 81.24  89.78 77.48 13.02 11.68 13.72 82.30 12.96
cifar10-l0                85.36 100   83.02  8.78 83.40 29.1  82.27  8.16 82.18 100    65.08  7.22 12.48 25.22 84.08  9.54
cifar10-l2                85.26 100   80.68  8.08 82.46  7.82 80.30 11.64 81.50  98.94 43.18 12.56 11.58 20.57 83.48  7.48
cifar10-smooth            85.34 99.24 83.72 46.88 83.32 61.82 84.14 45.94 82.66   9.44 77.22 54.38 10.70 28.14 83.46 18.30
cifar10-trojan-square     84.76 99.66 81.30  8.02 83.14  6.94 81.38  7.06 82.34  99.50 51.86  7.84 10.70 18.26 83.18  9.82
cifar10-trojan-watermark  84.92 99.96 81.76  6.02 82.88  7.24 82.60 49.26 81.64  99.88 56.84  0.82 15.21 32.89 83.58  3.42
cifar10-all-to-all        86.38 85.02 85.38 82.88 84.74 56.38 x     x     84.48  66.46 75.70  2.34 14.80 10.93 80.34 10.46
""",  # noqa: E501
    "table2": """
gtsrb-badnets           97.69 99.18 98.99  4.16 99.34 60.19 15.19  9.08 6.46 100   99.38 3.32
gtsrb-blend             97.44 99.91 99.09 33.32 99.52 69.66 47.71 18.48 5.70 100   98.89 5.01
gtsrb-l0                97.72 100   98.80  0.47 99.41 74.86 17.41  1.20 7.40 88.23 99.24 0.42
gtsrb-l2                97.57 99.91 98.51  0.41 99.53 40.46 15.50  1.16 5.46 100   97.75 0.45
gtsrb-smooth            97.87 99.89 98.62  0.47 99.55 47.75 10.06  0.70 5.94 95.58 98.96 0.22
gtsrb-trojan-square     98.12 99.98 99.06  5.70 99.48 75.96 23.31 14.68 5.51 100   99.04 5.11
gtsrb-trojan-watermark  97.84 100   98.63  5.40 99.45 69.82 11.16 13.62 5.70 100   99.44 2.55
gtsrb-all-to-all        97.10 95.42 98.63 47.07 99.45 67.34 25.53  0.42 5.87  5.70 99.13 0.04
""",
    "table3": """
cifar10-seven-target 85.96 98.37 x     x     83.74 30.37 84.04 40.68 83.42 73.18 77.38 10.93 11.18 12.83 77.44 12.96
gtsrb-seven-target   97.18 99.37 68.72 10.87 99.33  7.21 76.38 11.89 99.36  9.38 10.83 11.59  6.17 42.86 99.09  4.18
""",  # noqa: E501
    "table4": """
cifar10-trojan-watermark-0.05  86.58 99.88 83.14  5.58 78.63 10.40 x x 83.16 99.72 79.74  6.34 36.80 96.84 84.76  9.78
cifar10-trojan-watermark-0.005 86.42 98.58 84.16 12.9  83.56 20.22 x x 84.72 93.78 80.92 28.6  39.92 61.27 83.22 13.08
""",  # noqa: E501
    "table5": """
cifar10-trojan-watermark:2500 84.92 99.96 78.39  6.53 80.63 10.07 80.23 33.40 81.36 99.58 46.8  7.12 82.21 6.96
cifar10-trojan-watermark:500  84.92 99.96 78.24 25.66 80.17  1.14 77.03 21.92 78.1  85.68 38.5  9.08 80.07 5.20
cifar10-trojan-watermark:100  84.92 99.96 84.10 99.92 69.51  1.12 83.50 99.69 73.00 97.80 36.14 5.76 76.9  4.00
""",  # noqa: E501
}


def _figures(line: str, columns: tuple[str, ...]) -> dict[str, Figure]:
    values = [None if word == "x" else float(word) for word in line.split()[1:]]
    pairs = zip(values[::2], values[1::2], strict=True)
    return dict(zip(columns, (Figure(*pair) for pair in pairs), strict=True))


# table -> case -> method -> Figure
TABLES: dict[str, dict[str, dict[str, Figure]]] = {
    name: {line.split()[0]: _figures(line, COLUMNS[name]) for line in lines.strip().splitlines()}
    for name, lines in _LINES.items()
}

# Table 3, the ASR of each trigger in per cent, in the order of the paper's lines.
SEVEN = ("trojan-watermark", "trojan-square", "badnets", "smooth", "blend", "l0", "l2")
_SEVEN_LINES = {
    "cifar10-seven-target": """
99.92 x  9.68 28.02 99.7  18.38 13.40 11.48
99.42 x 13.78 19.56 99.36 11.94  2.58 10.80
94.5  x 72.6   9.16  9.56 13.32  6.94 18.64
97.08 x 30.58 89.70  9.32  8.38  6.28 15.22
98.12 x 48.84 50.84 96.14  8.46 27.98 18.24
100   x 23.78 80.96 99.88  9.88 18.02  9.46
99.54 x 13.34  6.52 98.32  6.16 14.62  6.92
""",
    "gtsrb-seven-target": """
99.49  4.00  3.60  3.86  1.56  6.61 100 1.78
99.59  2.79  6.26  2.33  0.12  4.14   0 5.68
98.19  6.61  0.47 10.29 14.09  4.79   0 0.72
99.89  8.56  6.92 15.28 10.05  2.83 100 5.65
99.15 46.89 22.66 45.91 29.69 41.54 100 3.76
100    1.31  5.15  1.06  0.59 17.70   0 5.25
99.33  5.94  5.43  4.52  9.60  3.52   0 6.46
""",
}
# case -> method -> trigger -> ASR
SEVEN_ASR: dict[str, dict[str, dict[str, float | None]]] = {
    case: {
        method: {
            trigger: None if line.split()[i] == "x" else float(line.split()[i])
            for trigger, line in zip(SEVEN, lines.strip().splitlines(), strict=True)
        }
        for i, method in enumerate(COLUMNS["table3"])
    }
    for case, lines in _SEVEN_LINES.items()
}

# Table 6: seconds until ASR < 20 %, the mean over the cases of one target.
SECONDS: dict[str, dict[str, float]] = {
    "cifar10": {
        **{"neural-cleanse": 384.92, "deepinspect": 394.38, "tabor": 1123.31},
        **{"fine-pruning": 45.33, "nad": 79.90, "ibau": 6.82},
    },
    "gtsrb": {
        **{"neural-cleanse": 1864.96, "deepinspect": 472.21, "tabor": 3529.70},
        **{"fine-pruning": 83.78, "nad": 79.14, "ibau": 7.84},
    },
}
