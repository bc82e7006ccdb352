"""Early-exit inference for image classifiers.

The modules, from tensors to whole runs; each imports only from those before it:

    errors  disk  pixels
    heads  losses  criteria  metrics  calibration  config
    checkpoint  distributed  runtime  splits  tensors
    network  policy  cost  energy
    records  overthinking  thresholds  search  guarantees  cdl  inference
    engine  journal  latency  choosing  report  wording  plots
    experiment  resuming  epochs  training
    trained  classifier  findings  charts  page  evaluation  recipes  labels
    flags  cli
    compare  predict  export
"""
