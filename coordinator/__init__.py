"""The control plane: two doors (HTTP, ZeroMQ) onto one core that decides who serves what.

Imports no engine and no transfer; starts and answers without torch.
"""
