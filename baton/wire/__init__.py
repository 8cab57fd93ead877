"""The only place that imports zmq. Carries frames; what they mean is the contract's business."""
