from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest_types import FakeHub
from safetensors.torch import save

from ernie45.checkpoint import download, hub
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.resolve import resolve
from ernie45.errors import CheckpointError, CorruptFileError, HubUnreachableError
