"""DINOv2 in the open: curated pictures in, a trained and measured backbone out.

Importing this package costs nothing. What a caller wants is imported from its own module, for example
`from dinov2.models import load_backbone`.
"""
