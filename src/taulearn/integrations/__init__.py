"""Time steps inside other trainers: callbacks for Hugging Face Trainer and for Lightning.

    from taulearn.integrations.huggingface import TimeStepsCallback
    from taulearn.integrations.lightning import TimeStepsCallback

Each is added to the trainer's list of callbacks; neither the model nor the trainer inherits from anything. What both do
is in companion.py, what makes their checkpoints those of pruned models in checkpoints.py.
"""
