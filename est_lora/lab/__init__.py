"""The laboratory: how well a subject and a style survive their fusion, measured on the embedded model's world."""
