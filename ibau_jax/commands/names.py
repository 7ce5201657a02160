"""The names in the help texts, in the order of their tables, which take JAX a second to import.

A test compares them with the tables (`data.DATASETS`, `attacks.ATTACKS`, `defenses.DEFENSES`,
`models.architectures.ARCHITECTURES`).
"""

DATASETS = ("digits", "cifar10", "gtsrb")
ATTACKS = ("badnets", "blend", "l0", "l2", "smooth", "trojan-square", "trojan-watermark")
DEFENSES = (
    *("ibau", "finetune", "neural-cleanse", "deepinspect", "tabor", "fine-pruning", "nad"),
    *("dp-sgd", "naive", "ft-sam", "sau", "anp", "clp"),
)
ARCHITECTURES = ("vgg", "vgg-mini", "preact-resnet18", "preact-resnet18-16", "vit-tiny", "vit-mini")
