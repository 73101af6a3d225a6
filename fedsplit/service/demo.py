"""A page on which a prediction can be watched: what stays, what leaves, and what an attacker makes of it.

The page computes first layer and dropping itself (``page/layer.js``) and asks the service as any device does. What it
asks for besides is what somebody with the server could do for himself: attack the upload with all that
:mod:`fedsplit.audit.audit` has, knowing public records. The page, which alone has the original, shows the closest.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from fedsplit.audit.attack import Problem
from fedsplit.audit.audit import known_before, peak_of, reconstructions, without_releases
from fedsplit.audit.evidence import Evidence, Seen, dense
from fedsplit.audit.prior import Prior
from fedsplit.audit.standard import STANDARD
from fedsplit.audit.transcript import Subjects, tested
from fedsplit.common.errors import ConfigError, WireError
from fedsplit.data import Records
from fedsplit.device.bundle import DESCRIPTION, WEIGHTS, Bundle
from fedsplit.plan.experiment import Experiment
from fedsplit.release.chosen import built_in
from fedsplit.release.policies import All, AtMost, Bits, Random, TopK, Units
from fedsplit.release.policy import Policy
from fedsplit.runs.folder import RunFolder
from fedsplit.service.app import body_of
from fedsplit.service.pages import add_page
from fedsplit.service.served import Served
from fedsplit.wire.release import Release

_PAGE = Path(__file__).parent / "page"
_MOST_PUBLIC = 2000  # records that the attacker knows
_SHOWN = 4  # decimals of a reconstruction
_ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "identity")  # those of page/layer.js, and its kinds
_KINDS = ("Linear", "Conv1d", "Conv2d")
_POLICIES = (All, AtMost, Bits, Random, TopK, Units)
_TYPES = {DESCRIPTION: "application/json", WEIGHTS: "application/octet-stream"}


@dataclass(frozen=True)
class Attacker:
    """Somebody with the server who knows public records.

    Attributes
    ----------
    served : Served
    public : Records
    prior : Prior
    classes : int
        How many there are; 0 if the task has none.
    """

    served: Served
    public: Records
    prior: Prior
    classes: int

    @classmethod
    def of_run(cls, folder: Path, served: Served) -> "Attacker":
        """Return one who knows the run's public records, or the test records of a packaged data set.

        Whoever uses the page sees means of them: of others' data only what is public may be shown.

        Raises
        ------
        ConfigError
            If the run has neither, or watches devices, or the page cannot compute its first layer.
        """
        if served.detector is not None:
            raise ConfigError(f"--demo is for models that predict, and that of {folder} watches devices")
        settings = RunFolder(folder).trained()
        experiment = Experiment(settings)
        source, public = experiment.source, experiment.public
        if public is None and (settings.data.name is None or not source.test_devices):
            raise ConfigError(f"--demo needs public records ([public]) for its attacks, and the run {folder} has none")
        public = tested(source) if public is None else public
        rows = np.random.default_rng(0).permutation(len(public.x))[:_MOST_PUBLIC]
        known = Records(public.x[rows], public.y[rows])
        bundle = served.bundle
        if not _on_a_page(bundle):
            why = "the page computes neither these nor kinds, numbers or policies of somebody's own"
            raise ConfigError(f"--demo is not for models with noise or GELU: {why}")
        classes = bundle.task.targets(bundle.outputs).classes
        return cls(served, known, known_before(known, classes), classes)

    def attack(self, release: Release, dropping: Policy) -> dict[str, Any]:
        """Return what the attacks make of one record's release: numbers ``(n,)`` of the scaled record by attack."""
        bundle, shape = self.served.bundle, self.served.bundle.layer.input_shape
        outputs = self.served.outputs([release])
        label = bundle.task.decide(outputs)
        labels = label if self.classes else None
        nothing, target = np.zeros((1, *shape), dtype=np.float32), np.arange(1)
        subjects = Subjects(nothing, label, target, target, nothing, target, self.public, False)
        seen = Seen(bundle.weights, target, *dense(release))
        evidence = Evidence(bundle.layer, dropping, bundle.dtype, subjects, [seen], [])
        guesses, _ = reconstructions(Problem.of(evidence, self.prior, target, labels, seed=0), STANDARD)
        return {
            "guesses": _shown(guesses),
            "without": _shown(without_releases(self.prior, labels, 1)),
            "peak": peak_of(self.public),
        }


def _on_a_page(bundle: Bundle) -> bool:
    """Whether ``page/layer.js`` has all that the device's half is made of."""
    layer = bundle.layer
    known = layer.nonlinearity.name in _ACTIVATIONS and not layer.nonlinearity.numbers and layer.kind.name in _KINDS
    return known and type(bundle.dropping) in _POLICIES


def _shown(guesses: dict[str, Any]) -> dict[str, list[float]]:
    return {name: np.round(guess[0], _SHOWN).tolist() for name, guess in guesses.items()}


def add_demo(app: FastAPI, attackers: Sequence[Attacker]) -> None:
    """Add the page, the device's files and the attack to a service; all but the page itself need a token."""
    by_name = {attacker.served.name: attacker for attacker in attackers}
    files = {name: attacker.served.bundle.files() for name, attacker in by_name.items()}
    busy = asyncio.Lock()

    def known(request: Request, name: str) -> Attacker:
        request.app.state.let_in(request)
        if name not in by_name:
            raise HTTPException(404, f"there is no model {name[:64]!r} here")
        return by_name[name]

    @app.get("/", include_in_schema=False)
    async def _front() -> Response:
        return RedirectResponse("/demo/")

    @app.get("/demo/models/{name}/{file}", include_in_schema=False)
    async def _file(name: str, file: str, request: Request) -> Response:
        known(request, name)
        if file not in _TYPES:
            raise HTTPException(404, "a device has no such file")
        return Response(files[name][file], media_type=_TYPES[file])

    @app.post("/demo/models/{name}/attack", include_in_schema=False)
    async def _attack(
        name: str, request: Request, policy: str, keep: float = 1.0, k: int = 0, bits: int = 0
    ) -> Response:
        """Attack one record's upload, made under the policy that is named."""
        attacker = known(request, name)
        layer = attacker.served.bundle.layer
        try:
            dropping = built_in(policy, keep=keep, k=k, bits=bits)
            dropping.fits(layer)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from None
        async with body_of(request, attacker.served) as payload:
            try:
                release = attacker.served.read(payload)
            except WireError as error:
                raise HTTPException(422, str(error)) from None
            if len(release.counts) != 1 or not release.bits == bits == dropping.code.bits:
                raise HTTPException(422, "a query of one record is needed, in the policy's codes")
            if busy.locked():  # looked at when the body is there: a slow one holds nobody up
                raise HTTPException(503, "an attack is on its way already", {"Retry-After": "5"})
            async with busy:
                return JSONResponse(await asyncio.to_thread(attacker.attack, release, dropping))

    add_page(app, "demo", _PAGE)
