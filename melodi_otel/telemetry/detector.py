"""The resource: whose telemetry this is, for our own providers and, as a resource detector, for everybody else's.

``OTEL_EXPERIMENTAL_RESOURCE_DETECTORS=melodi_otel`` puts the same attributes on the application's own resource; in a
configuration file the detector has the same name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from opentelemetry.sdk.resources import Resource, ResourceDetector

from melodi_otel import semconv as names
from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.identity import Identity, Places, given, identify
from melodi_otel.telemetry.complaints import Complaints

_SETTINGS: Final = ("MELODI_DISABLED", "MELODI_HOST_ID", "MELODI_PROCFS_ROOT", "MELODI_SYSFS_ROOT")


class IdentityDetector(ResourceDetector):
    """Finds host, CPU, GPUs, container, Kubernetes pod and SLURM job.

    Never raises, whatever ``raise_on_error`` says; what cannot be found is absent. With ``MELODI_DISABLED=1`` it finds
    nothing.

    Args:
        raise_on_error: the SDK's parameter; there is nothing to raise.
        environ: the environment.
        places: where files are; None: as ``MELODI_PROCFS_ROOT`` and ``MELODI_SYSFS_ROOT`` say.
    """

    def __init__(
        self,
        raise_on_error: bool = False,
        *,
        environ: Mapping[str, str] = os.environ,
        places: Places | None = None,
    ) -> None:
        super().__init__(raise_on_error)
        self._environ = environ
        self._places = places

    def detect(self) -> Resource:
        """The resource; empty where nothing is known."""
        try:
            config = _config(self._environ)
            if config.disabled:
                return Resource({})
            return Resource({**find(config, self._environ, places=self._places).attributes})
        except Exception as error:
            Complaints("resource detector")("looking", error)
            return Resource({})


def find(
    config: Config,
    environ: Mapping[str, str],
    gpus: Sequence[str] = (),
    driver: str | None = None,
    *,
    places: Places | None = None,
) -> Identity:
    """What is known of where this process runs, by the settings in force.

    Args:
        config: ``MELODI_HOST_ID`` and the roots of procfs and sysfs.
        environ: the environment.
        gpus: model names of GPUs that the meters know, where no file tells them.
        driver: version of their driver, likewise.
        places: where files are; None: as ``config`` says.
    """
    places = places or Places(sysfs=config.sysfs_root, procfs=config.procfs_root)
    return identify(environ, places, host_id=config.host_id, gpus=gpus, driver=driver)


def host_resource(
    config: Config,
    environ: Mapping[str, str] = os.environ,
    gpus: Sequence[str] = (),
    driver: str | None = None,
    *,
    places: Places | None = None,
) -> Resource:
    """The resource of our own providers: what :func:`find` finds, below what the application says of itself.

    ``OTEL_RESOURCE_ATTRIBUTES`` comes first, then ``MELODI_HOST_ID``, then the detectors that the application asked for,
    then ours.
    """
    found = find(config, environ, gpus, driver, places=places)
    resource = Resource({**found.attributes}).merge(Resource.create())
    if config.host_id and names.HOST_ID not in given(environ):
        resource = resource.merge(Resource({names.HOST_ID: config.host_id}))
    return resource


def _config(environ: Mapping[str, str]) -> Config:
    """Our settings; one that cannot be used is left out here: whoever starts the meter is told."""
    config = Config()
    for name in _SETTINGS:
        try:
            one = Config.from_env({name: environ.get(name, "")})
        except ConfigError:
            continue
        field = name.removeprefix("MELODI_").lower()
        config = replace(config, **{field: getattr(one, field)})
    return config


def said(value: object) -> str | None:
    """An attribute of a resource as text; None: it is absent, or the SDK's name for a service that has none."""
    text = str(value) if value else ""
    return None if not text or text.startswith("unknown_service") else text
