"""What lies on a disk: checkpoints, run folders, Hugging Face's folders.

May import data and all that data may.  Start with checkpoint.py, one safetensors file.  folder.py is a run's folder,
hub.py goes from any path to weights and a config, pretrained.py to a model for a command.
"""
