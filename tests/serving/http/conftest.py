"""One scripted engine and one server of it for each module; the official client."""

import openai
import pytest
from starlette.testclient import TestClient

from mimo_jax.serving.http.app import create_app
from tests.serving.http.scripted import TEMPLATE, ScriptedEngine, make_service, serving


@pytest.fixture(scope="module")
def module_engine():
    return ScriptedEngine()


@pytest.fixture
def engine(module_engine):
    """With nothing left of the test before."""
    module_engine.says("Hello")
    module_engine.requests.clear()
    module_engine.cancelled.clear()
    return module_engine


@pytest.fixture(scope="module")
def service(module_engine):
    return make_service(module_engine, TEMPLATE)


@pytest.fixture(scope="module")
def address(service):
    with serving(create_app(service)) as address:
        yield address


@pytest.fixture(scope="module")
def app_client(service):
    """In this process, where exceptions that the app lets through are raised."""
    return TestClient(create_app(service))


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
