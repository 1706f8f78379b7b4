"""params.yaml as a whole. The settings of a stage are beside its code: `lotlip/STAGE/config.py`."""
