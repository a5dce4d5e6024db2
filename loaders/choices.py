"""The words that keys of `data:` may have; who acts on a word imports it from here.

In a file of their own so that a configuration is checked without torch.
"""

SAMPLERS = ("balanced", "proportional", "ratio")  # loaders.order.plan_streams
MERGES = ("disjoint", "synset")  # loaders.labels.LabelSpace
CAPTION_LABELS = ("unique", "by_text")  # loaders.batch.TripletDataset
AUGMENTATIONS = ("unicl_release", "paper", "clip", "clipart", "none")  # loaders.views.build_train
