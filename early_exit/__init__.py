"""Early-exit inference for image classifiers.

The modules, from tensors to whole runs, each importing only from lines above its own:

    errors
    heads  losses  criteria  calibration  metrics  config  checkpoint  runtime
    network  policy  cost
    records  thresholds  inference
    engine  journal  latency  report  plots
    experiment
    training  evaluation
    cli
"""
