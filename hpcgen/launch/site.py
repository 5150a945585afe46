"""What a job asks of a cluster: a site profile, the same for all verbs, and the resources of each verb."""

from dataclasses import dataclass, field
from pathlib import Path

from hpcgen.errors import UsageError

VERBS = ("preprocess", "train", "campaign", "evaluate", "report")
GPU_FLAGS = ("gres", "gpus-per-node", "gpus-per-task", "none")
OWN_FLAGS = (
    "job-name",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "signal",
    "dependency",
    "kill-on-invalid-dep",
    "array",
    "wrap",
)  # of the batch script: it relies on what it says there itself


@dataclass
class Resources:
    """What one verb asks for. 0 and '' leave a flag out, and the site's default holds."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    mem: str = ""  # of each node, as 480G; 0: all of it
    minutes: int = 1440

    @property
    def tasks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.tasks_per_node


@dataclass
class Site:
    """A cluster and its account. Nothing here has a default that would only hold at one site."""

    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    gpu_flag: str = "gres"
    gpu_type: str = ""  # as a100
    exclusive: bool = False
    extra: dict[str, str] = field(default_factory=dict)  # further flags of sbatch, without dashes
    signal_s: int = 120  # seconds before the end of the job at which it is told; 0: it is not

    setup: list[str] = field(default_factory=list)  # lines of the batch script before anything runs
    env: dict[str, str] = field(default_factory=dict)
    container: str = ""  # put before the command of every task
    python: str = ""  # interpreter of the jobs; '': the one that submits
    mpi: str = "pmix"  # of srun, for all verbs but train; none: the tasks share the work through files alone
    srun: list[str] = field(default_factory=list)  # further flags of srun, with dashes
    interface: str = ""  # network interface of training, as ib0
    master_suffix: str = ""  # after the name of the first node, as -ib or i

    preprocess: Resources = field(default_factory=Resources)
    train: Resources = field(default_factory=Resources)
    campaign: Resources = field(default_factory=Resources)
    evaluate: Resources = field(default_factory=Resources)
    report: Resources = field(default_factory=Resources)

    def resources(self, verb: str) -> Resources:
        """Those of one verb."""
        return {name: getattr(self, name) for name in VERBS}[verb]

    def checked(self) -> "Site":
        """This profile, if it can be. Raises UsageError naming the key that cannot."""
        if self.gpu_flag not in GPU_FLAGS:
            raise UsageError(f"gpu_flag = {self.gpu_flag!r}: want one of {', '.join(GPU_FLAGS)}")
        if self.signal_s < 0 or self.signal_s > 65535:
            raise UsageError(f"signal_s = {self.signal_s}: want 0 to 65535 seconds")
        for name in self.extra:
            if name in OWN_FLAGS:
                raise UsageError(f"extra.{name}: the batch script sets --{name} itself, want another flag")
        for verb in VERBS:
            self._check(verb)
            minutes = self.resources(verb).minutes
            if self.signal_s and 60 * minutes < self.signal_s + 60:  # the signal comes up to a minute early
                raise UsageError(
                    f"signal_s = {self.signal_s} with {verb}.minutes = {minutes}: the job would hear of its end before "
                    "it begins; want at least a minute more than signal_s"
                )
        texts = [*self.extra.items(), *((name, value) for name, value in vars(self).items() if isinstance(value, str))]
        for name, value in texts:
            if "\n" in str(value):
                raise UsageError(f"{name}: holds a line break, want one line")
        return self

    def _check(self, verb: str) -> None:
        asked = self.resources(verb)
        for name, least in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 0), ("cpus_per_task", 0),
                            ("minutes", 1)):  # fmt: skip
            if getattr(asked, name) < least:
                raise UsageError(f"{verb}.{name} = {getattr(asked, name)}: want at least {least}")
        if verb == "report" and asked.tasks > 1:
            raise UsageError(f"report: nodes * tasks_per_node = {asked.tasks}: one process draws the page, want 1")
        tasks, gpus = asked.tasks_per_node, asked.gpus_per_node
        if gpus and tasks > gpus:
            raise UsageError(
                f"{verb}.tasks_per_node = {tasks} with {verb}.gpus_per_node = {gpus}: want one task for each GPU"
            )
        if verb == "train" and gpus and tasks != gpus:
            raise UsageError(f"train.tasks_per_node = {tasks}: want train.gpus_per_node = {gpus}, a task for each GPU")
        if self.gpu_flag == "gpus-per-task" and gpus and tasks != gpus:
            raise UsageError(
                f"{verb}.tasks_per_node = {tasks}: gpu_flag = gpus-per-task wants as many as gpus_per_node = {gpus}"
            )

    def flags(self, verb: str) -> dict[str, str]:
        """Flags of sbatch by name; '' for one without a value."""
        asked, kind = self.resources(verb), f"{self.gpu_type}:" if self.gpu_type else ""
        told = {name: getattr(self, name) for name in ("account", "partition", "qos", "constraint", "reservation")}
        told |= {"nodes": str(asked.nodes), "ntasks-per-node": str(asked.tasks_per_node)}
        if asked.gpus_per_node and self.gpu_flag != "none":
            told[self.gpu_flag] = {
                "gres": f"gpu:{kind}{asked.gpus_per_node}",
                "gpus-per-node": f"{kind}{asked.gpus_per_node}",
                "gpus-per-task": f"{kind}1",
            }[self.gpu_flag]
        told |= {"cpus-per-task": str(asked.cpus_per_task or ""), "mem": asked.mem, "time": str(asked.minutes)}
        told = {name: value for name, value in told.items() if value}
        return told | ({"exclusive": ""} if self.exclusive else {}) | {k: str(v) for k, v in self.extra.items()}


def read_site(file: Path | None, words: list[str]) -> Site:
    """A profile from its file and `key=value` words. Raises UsageError."""
    from hpcgen.config import load_config  # OmegaConf: not for the parser of the command line

    return load_config(Site, file, words).checked()
