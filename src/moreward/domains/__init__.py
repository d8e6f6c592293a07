"""Does this data deserve its own expert? Cheap probes on frozen features, before anything is trained."""
