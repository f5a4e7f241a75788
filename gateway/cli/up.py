"""Owns `poolgate up`: the whole system on one machine, started step by step, kept running, stopped in order.

What is checked before is plan.py's, how parts are restarted parts.py's, what is said snippets.py's.
"""

import argparse
import asyncio
import time
from pathlib import Path

from config.embedded import DataFolderInUse, EmbeddedStartFailed, EmbeddedStores
from config.postgres import migrate
from gateway.cli import folder
from gateway.cli.agent import add_engines
from gateway.cli.development import Identity, prepare_identity
from gateway.cli.engine import prepare_engine
from gateway.cli.logfiles import LogFile
from gateway.cli.output import Refused, stderr
from gateway.cli.parsing import Parser, add_command, settings_options
from gateway.cli.parts import ChildPart, GaveUp, Parts
from gateway.cli.plan import Plan, check_port, plan_of
from gateway.cli.probes import answers, available_models
from gateway.cli.serve import add_listening
from gateway.cli.snippets import Greeting, greeting
from gateway.cli.steps import Say, Steps
from gateway.cli.stopping import Stopped, StopRequest
from gateway.cli.stores import explained

TICK_S = 0.2
MODELS_EVERY_S = 0.5
# A gateway that opens no port for this long has a fault that waiting does not mend.
GATEWAY_BOUND_S = 30.0
# Given engines that do not answer within this are waited for in the background, the key is shown meanwhile.
GIVEN_ENGINE_PATIENCE_S = 5.0
# Beyond the grace that parts give begun turns: closing connections and writing what is left.
STOP_MARGIN_S = 10.0

DETAILS = """\
Starts PostgreSQL and Valkey in the data folder (unless DATABASE_URL and REDIS_URL name real ones), the
gateway, and a node agent with a vLLM engine; then prints the base URL, an API key with a starting
balance, and requests to paste. The first start builds the engine's environment (about 2.7 GB, some
minutes); later ones take seconds. Whatever dies is started again; Ctrl-C and SIGTERM stop everything,
and so does closing the terminal. `kill -HUP` is passed on to the gateway, which reads the settings file
and the price book again without dropping a connection (`poolgate serve --help` says what that changes);
stores and agent stay, and so do host, port and number of workers, which this command chose at its start."""

EXAMPLES = """\
  poolgate up
  poolgate up --port 9000 --data-dir /var/lib/poolgate --workers 2
  poolgate up --engine-url http://127.0.0.1:8000            over a vLLM server that runs already
  poolgate up --engine-url http://10.0.0.5:8000 --engine-url http://10.0.0.6:8000
  poolgate up --model ~/models/my-model                     with another model
  poolgate up --no-node                                     agents on other hosts bring the engines
  poolgate up --key sk-local-test-key                       with a key of your own, on loopback only"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "up", "start the whole system on this machine", run=run, details=DETAILS, examples=EXAMPLES,
        options=(settings_options(),),
    )  # fmt: skip
    add_listening(parser)
    group = parser.add_argument_group("node")
    add_engines(group)
    group.add_argument("--no-node", action="store_true", help="start no agent and no engine")
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="a string of your own (8 characters or more) that is a valid key during this run; loopback only",
    )


def run(args: argparse.Namespace) -> int:
    plan = plan_of(args)
    stop = StopRequest()
    with stop.installed(), folder.own(plan.data_dir, plan.base_url):
        check_port(plan)  # after the folder: a second `up` is told of the first one, not of its port
        steps = Steps(stderr())
        parts = Parts(tell=lambda words: steps.tell(words, style="yellow"))
        try:
            System(plan, parts, steps, stop).run()
        except Stopped:
            pass
        except GaveUp as error:
            raise Refused(str(error)) from error
        except (DataFolderInUse, EmbeddedStartFailed) as error:
            raise Refused(str(error)) from error
        finally:
            steps.tell(f"stopping everything{stop.because} (again: at once)")
            parts.stop(is_hurried=stop.is_hurried)
            steps.tell("stopped")
    return 0


class System:
    """The steps from nothing to a served turn, and the watch after them."""

    def __init__(self, plan: Plan, parts: Parts, steps: Steps, stop: StopRequest) -> None:
        self._plan = plan
        self._parts = parts
        self._steps = steps
        self._stop = stop

    def run(self) -> None:
        """Returns never: ends with Stopped, GaveUp or Refused. The caller stops `parts`."""
        database_url, redis_url = self._start_stores()
        identity = self._prepare_database(database_url)
        models = prepare_engine(self._plan, self._steps, self._stop.interrupting)
        self._start_gateway(database_url, redis_url)
        if self._plan.has_node:
            self._start_agent(identity, models)
        model = self._await_model()
        self._greet(identity, model)
        self._watch(has_model=bool(model))

    def _start_stores(self) -> tuple[str, str]:
        settings = self._plan.settings
        if settings.database_url and settings.redis_url:
            self._steps.tell("stores: those of DATABASE_URL and REDIS_URL")
            return settings.database_url, settings.redis_url
        with self._steps.step("stores") as say, self._stop.interrupting():
            stores = EmbeddedStores.start(self._plan.data_dir, progress=say)
            self._parts.stores = stores
            say(f"=PostgreSQL and Valkey in {self._plan.data_dir}")
        return settings.database_url or stores.database_url, settings.redis_url or stores.redis_url

    def _prepare_database(self, url: str) -> Identity:
        settings = self._plan.settings
        with self._steps.step("database") as say, self._stop.interrupting(), explained(url):
            applied = asyncio.run(migrate(url, progress=say))
            say(f"={len(applied)} migrations applied" if applied else "=up to date")
            return asyncio.run(prepare_identity(url, settings, self._plan.key))

    def _start_gateway(self, database_url: str, redis_url: str) -> None:
        settings = self._plan.settings
        with self._steps.step("gateway") as say:
            self._parts.start(
                ChildPart(
                    "gateway",
                    self._plan.serve_arguments(),
                    self._plan.serve_environment(database_url, redis_url),
                    self._log("gateway"),
                    settings.shutdown_grace_s + STOP_MARGIN_S,
                )
            )
            deadline = time.monotonic() + GATEWAY_BOUND_S
            while not answers(self._plan.base_url):
                self._tick(say, "it opens its port")
                if time.monotonic() > deadline:
                    log = self._log("gateway")
                    raise GaveUp(f"the gateway opens no port; {log.path} ends with:\n{log.tail()}")
            say(f"={self._plan.base_url}")

    def _start_agent(self, identity: Identity, models: tuple[Path, ...]) -> None:
        settings = self._plan.settings
        self._parts.start(
            ChildPart(
                "agent",
                self._plan.agent_arguments(models),
                self._plan.agent_environment(identity.node_key),
                self._log("agent"),
                settings.engine_drain_s + STOP_MARGIN_S,
            )
        )

    def _await_model(self) -> str:
        """A model that can be served, or nothing where that is not to be waited for."""
        plan = self._plan
        if not plan.has_node:
            return ""
        patience_s = GIVEN_ENGINE_PATIENCE_S if plan.engine_urls else float("inf")
        waiting_for = "for an answer" if plan.engine_urls else "vLLM loads the model (25 s on a small CPU)"
        began = time.monotonic()
        with self._steps.step("engine") as say:
            while not (models := available_models(plan.base_url)):
                if time.monotonic() - began > patience_s:
                    say("=not reachable yet")
                    return ""
                self._tick(say, waiting_for)
            say(f"=serves {', '.join(models)}")
        return models[0]

    def _greet(self, identity: Identity, model: str) -> None:
        plan = self._plan
        note = ""
        if not plan.has_node:
            note = "No node yet: on a GPU host, run `poolgate agent` (its --help says how to get a key)."
        elif not model:
            where = ", ".join(plan.engine_urls)
            note = f"No engine answers yet at {where}: requests get 503 until one does, which is told here."
        facts = Greeting(
            base_url=plan.base_url, key=identity.key, balance=identity.balance, model=model, note=note,
            logs=str(plan.data_dir / "logs"),
        )  # fmt: skip
        print(f"\n{greeting(facts)}", flush=True)

    def _watch(self, *, has_model: bool) -> None:
        look_again = 0.0
        while True:
            self._stop.check()
            self._parts.tick(time.monotonic())
            if self._stop.takes_reload():
                self._parts.reload_gateway()
            if not has_model and time.monotonic() >= look_again:
                look_again = time.monotonic() + MODELS_EVERY_S
                if models := available_models(self._plan.base_url):
                    has_model = True
                    self._steps.tell(f"an engine is ready and serves {', '.join(models)}", style="green")
            time.sleep(TICK_S)

    def _tick(self, say: Say, waiting_for: str) -> None:
        self._stop.check()
        self._parts.tick(time.monotonic())
        say(waiting_for)
        time.sleep(TICK_S)

    def _log(self, name: str) -> LogFile:
        return LogFile(self._plan.data_dir / "logs" / f"{name}.log")
