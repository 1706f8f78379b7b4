"""params.yaml as a whole. The settings of each stage are next to its code, in `lotlip/STAGE/config.py`."""
