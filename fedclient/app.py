"""The client that a hospital installs: the learner of its images, behind the gate."""

from fedclient.client import client_app
from fedclient.gate.ready import ready
from fedclient.training.learner import ImageLearner

app = client_app(ImageLearner(), ready)
