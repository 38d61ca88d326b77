"""What lies on a disk: checkpoints, run folders, Hugging Face's folders.

May import data and all that data may.  Start with checkpoint.py, one safetensors file.  folder.py is a run's folder,
with log.py, hub.py one of Hugging Face's, and weights.py what both must hold.  pretrained.py goes from any path to
weights and a config, and to a model for a command.
"""
