"""What one run is: the typed config tree.

`conf/` holds named choices for each group below; Hydra composes them into one tree, and `checks.strict` turns that tree
into a `Config` and refuses everything it does not know. Nothing here imports torch or numpy, so that a wrong config
fails before anything heavy is loaded; of dptune only `privacy.rules`, whose dicts are the choices of a privacy plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from dptune.config.adapters import ADAPTERS
from dptune.privacy.rules import ALLOCATIONS, CLIPPINGS, GROUPINGS, SCHEDULES, UNITS, WEIGHTS, NoiseMode

EMBEDDED = ("tiny", "nano")
"""Backbones that are shipped with the package."""


SHIPPED, CHECKSUMS = Path(__file__).parents[1] / "models" / "shipped", "SHA256SUMS"
"""Folder of the shipped backbones, and the file in each that has the hashes of the others."""


EMBEDDED_DATA = {"supportdesk": "organisation"}
"""Data that is made by the package (`dptune.data.sources.SOURCES`): it needs no file, and is public. By its name: the
field of `DataConfig` that chooses among its variants."""


ON_PUBLIC_GRADIENTS = ("public", "scale")
"""Choices of `privacy.projection` that need public records."""


SPLITS = ("train", "validation", "test")
"""Splits of a run's data."""


PRETRAINED_ON = ("acorn", "beacon", "cypress", "dynamo")
"""Organisations of the support desk that the embedded backbones were pretrained on: public, and nothing to protect."""


class ConfigError(ValueError):
    """A config that cannot be run: one line that names the field, what is wrong and the way out."""


def _one_of(*choices: str, default: str | None = None) -> Any:
    """A string field; the first choice is the default unless another one is named."""
    return field(default=default or choices[0], metadata={"choices": choices})


def _number(default: Any, **bounds: float) -> Any:
    """A number with bounds: `above` and `below` exclude the bound, `least` and `most` include it."""
    return field(default=default, metadata=bounds)


@dataclass
class ModelConfig:
    """The frozen backbone."""

    name: str = "tiny"
    """`tiny` and `nano` are embedded; any other name is a label for `path` or `repo`."""
    path: str | None = None
    """A local folder in Hugging Face format, or a `.gguf` file; when given, it is the backbone. Remote code is never
    run."""
    repo: str | None = None
    """Model on the Hugging Face Hub; loaded if there is no `path`. Safetensors and tokenizer only."""
    revision: str | None = None
    """Commit of `repo`, all 40 digits: a branch may hold other weights tomorrow."""


@dataclass
class AdapterConfig:
    """Which parameters are trained. The rank is `hyperparameter.rank`."""

    name: str = _one_of(*ADAPTERS)
    """Kind of adapter; `src/dptune/models/README.md` describes each."""
    target_modules: list[str] | None = None
    """Suffixes of the layers that carry the adapter; null means what is usual for its kind."""
    top_layers: int | None = _number(None, least=1)
    """Number of layers, counted from the last one, that carry the adapter; null means all."""
    alpha: float = _number(8.0, above=0)
    """Scale of low-rank updates: alpha / rank * B A."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    embeddings: bool = False
    """LoRA also on the input embeddings and the output head."""
    dropout: float = _number(0.0, least=0, below=1)
    """Must stay 0: dropout would be noise that the privacy plan did not draw, and noise averages it away anyway."""
    virtual_tokens: int = _number(10, least=1)
    """Length of a soft prompt or prefix."""
    bottleneck: int = _number(16, least=1)
    """Width of a bottleneck adapter, and of the network that makes the prompt in p-tuning."""
    sparsity: float = _number(0.9, above=0, below=1)
    """PST: share of each matrix's weights that is zero at the end (arXiv:2205.11005)."""


@dataclass
class PrivacyConfig:
    """What is protected, at which (epsilon, delta), and how clip and noise are shared out."""

    name: str = "adaptive"
    """Label of the setting in tables."""
    enabled: bool = True
    """False trains without clip and noise, on the same path; its results say "non-private"."""
    unit: str = _one_of(*UNITS)
    """Unit of privacy: one example, or one user by sampling examples (ELS) or users (ULS)."""
    target_epsilon: float | None = _number(8.0, above=0)
    """The noise multiplier is calibrated so that training spends at most this epsilon."""
    noise_multiplier: float | None = _number(None, above=0)
    """Instead of a target epsilon: noise standard deviation over sensitivity, as is."""
    delta: float = _number(1e-5, above=0, below=1)
    """Fixed before training; must be below one over the number of protected units."""
    budget: float | None = _number(None, above=0)
    """Most epsilon, at `delta`, of all runs on the same private data together, on this machine (SPECIFICATION.md 8.3).
    A run that would exceed it is refused. Null: this run names no limit; what it costs is booked all the same.
    `dptune budget` shows the account."""
    examples_per_user: int | None = _number(None, least=1)
    """User-level only: ELS keeps at most this many examples of a user, ULS averages at most this many."""
    clipping: str = _one_of(*CLIPPINGS, default="scaled_flat")
    """How one unit's gradient is bounded (SPECIFICATION.md 2.1 and 4)."""
    clipping_stability: float = _number(0.01, above=0)
    """The constant gamma of AUTO-S and r of PSAC."""
    grouping: str = _one_of(*GROUPINGS, default="matrix")
    """Which parameters share a group (SPECIFICATION.md 2.1)."""
    allocation: str = _one_of(*ALLOCATIONS, default="min_energy")
    """How noise is shared over the groups at a fixed total (SPECIFICATION.md 2.2 to 2.5)."""
    allocation_weights: str = _one_of(*WEIGHTS, default="released_energy")
    """Importance of a group: constant, or from gradients that were already released (SPECIFICATION.md 2.6)."""
    allocation_ema: float = _number(0.8, least=0, below=1)
    """Memory of the released energies."""
    allocation_floor: float = _number(1e-3, above=0, most=1)
    """Smallest weight over largest weight."""
    quantile: float | None = _number(None, above=0, below=1)
    """Track this quantile of the gradient norms of each group as its clip; its bits are paid for."""
    quantile_learning_rate: float = _number(0.2, above=0)
    """Step of the tracker in log scale."""
    quantile_share: float = _number(0.01, above=0, below=1)
    """Share of each step's budget that the quantile bits take."""
    schedule: str = _one_of(*SCHEDULES)
    """Public schedule of the noise multiplier over the steps (SPECIFICATION.md 3)."""
    schedule_ratio: float = _number(0.5, above=0)
    """Last over first noise multiplier of the schedule; `constant` has none."""
    projection: str = _one_of("none", "random", "history", "rgp", "public", "scale", "private")
    """Clip and noise in a subspace of each group: random and public, half from past releases, low-rank carriers from
    past releases (`rgp`, arXiv:2106.09352), from public gradients, or from private ones, which is paid for; or in all
    coordinates, each divided by its `scale` in public gradients (arXiv:2202.05963). Public gradients are of
    `public.data`, and without a start from them of the support desk's "dev" (SPECIFICATION.md 5)."""
    projection_dimension: int = _number(16, least=1)
    """Coordinates kept of each group; with `rgp` the rank of the carriers."""
    projection_refresh: int = _number(10, least=1)
    """Steps after which a random, history or rgp subspace is drawn anew."""
    projection_noise_multiplier: float | None = _number(None, above=0)
    """Noise multiplier of finding a private subspace."""
    score_noise_multiplier: float | None = _number(None, above=0)
    """Count the right answers on the private validation split, with Gaussian noise of this standard deviation, as the
    score that a search chooses by (SPECIFICATION.md 8.2). Null: no score; the validation split is not looked at."""
    noise_mode: str = _one_of("auto", *get_args(NoiseMode))
    """`secure`: keys from the operating system, never stored. `reproducible`: from the seed, so that the epsilon is
    accounted but not realised for anyone who knows the seed. `auto`: reproducible for public stand-in data that is
    embedded or on the Hub, else secure.
    """
    allow_known_noise: bool = False
    """Private data only: accept `noise_mode=reproducible`, with which there is no guarantee against anyone who knows
    the seed, and the seed is in the record."""


@dataclass
class ColumnsConfig:
    """Where each part of a record is found: the name of a field, or `=` and a text.

    A name with dots leads into nested fields and lists: `answers.text.0`. Of a text, each `{field}` is replaced by that
    field of the record: `"=Classify the sentiment."` is the same for all records, `"={premise} / {hypothesis}"` joins
    two fields, and `"="` alone says that there is none. On a command line:
    `'data.columns.instruction="=Say it again: {text}"'`. A field that is named here and differs from its default must
    be in every record (it may be null, except instruction and output).
    """

    instruction: str = "instruction"
    """What to do (required)."""
    input: str = "input"
    """What to do it with; may be absent."""
    output: str = "output"
    """The response (required). With options, an integer is a position among them, counted from 0."""
    options: str = "options"
    """List of the options; null or absent means `data.options`, or a free-form response."""
    task: str = "task"
    """Name of the task; absent means one task."""
    user: str = "user"
    """Author; needed for user-level privacy and for splits by user only."""
    split: str = "split"
    """Split of the record, as `data.splits` says; absent means by a hash, see `data.split_by`."""
    id: str | None = None
    """Identifier that must not occur twice; null means that the records have none."""


@dataclass
class DataConfig:
    """The instructions and tasks. How to bring your own: `src/dptune/data/README.md`."""

    name: str = next(iter(EMBEDDED_DATA))
    """`supportdesk` is embedded; any other name is a label of the records at `path` or `hub_id`."""
    path: str | None = None
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, each also with .gz, or .parquet), a folder of such files, a pattern
    like `parts/*.jsonl`, or a folder written by `save_to_disk` of the library `datasets`. Of several files, names like
    train, dev and test say the split."""
    hub_id: str | None = None
    """Data set on the Hugging Face Hub; read if there is no `path`. Needs the extra `hub`."""
    hub_config: str | None = None
    """Configuration of the data set on the Hub."""
    hub_revision: str | None = None
    """Commit of the data set on the Hub; null takes the newest, which may be another one tomorrow."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Where each part of a record is found."""
    options: list[str] | None = None
    """Options of every record that has none of its own."""
    layout: str = _one_of("auto", "records", "conversations", "messages", "trees", "instances", "articles")
    """What a row is; `auto` sees it by the names of its fields, and stops where rows differ in it. `records`: an
    example. `conversations`: a list of turns (`messages` of role and content, `conversations` of from and value), which
    is one example, all of whose replies are learned. `messages`: one message of a conversation tree, as in oasst1, and
    each reply of an assistant is an example. `trees`: such a tree in one row. `instances`: of a Natural Instructions
    task. `articles`: paragraphs with questions, as in SQuAD. Of `messages`, `trees` and `articles` more than one
    person's words are in an example, so that a user-level unit must be the whole:
    `data.columns.user=message_tree_id`, or `title`."""
    examples_per_record: int = _number(1, least=1)
    """Most examples of one row of `trees` or `instances`, drawn by a hash of the row: paths through a tree, or outputs
    of an instance. What one record can change is multiplied by it."""
    field_names: list[str] | None = None
    """Names of the fields of .csv and .tsv files that have no header, and of JSON rows that are lists."""
    splits: list[str] | None = None
    """Pairs `source:ours` from the source's names of splits to `train`, `validation`, `test`, or `hash` to split them
    here, as in `[train:train, dev:test]`; what is not named is left out. Null: the source's names are ours."""
    split_by: str = _one_of("record", "user")
    """Records without a split go to train, validation and test (80, 10, 10 %) by a hash of their content, or of their
    user; so adding a record, or a user, moves no other."""
    public: bool | None = None
    """Everybody may already read the records, which stand in for private ones: epsilon is stated as if they were
    private. Null: true for `supportdesk` alone. Of records at `path`, which nobody else can be seen to have, this alone
    switches off no protection: each has a key of its own (privacy/SHARP_EDGES.md 1)."""
    plain_hashes: bool = False
    """Public records at `path` only: names of runs and fingerprints are hashes without a key, the same everywhere."""
    diagnostics: bool = False
    """Public records at `path` only: record, tables and page also hold what tells about single records, as for embedded
    data: accuracy on unseen inputs, training loss, exact times and memory."""
    organisation: str = _one_of("private", "dev", *PRETRAINED_ON)
    """Support desk only: `dev` is public and is what settings are chosen on. The others are for `public.data` alone:
    the embedded backbones have seen them."""
    seed: int = _number(0, least=0)
    """Seed of the generated records, of subsets and of conditions; not of training."""
    train_size: int | None = _number(4000, least=1)
    """Number of training records kept (null: all), on average: of n, each is kept with probability `train_size` / n by
    a hash of its content. n is the number that is counted in public data, else `declared_size`."""
    declared_size: int | None = _number(None, least=1)
    """Public number of training records of the source, stated by you before reading it and not counted; the plan's N
    follows from it and not from the file. Null: N is counted, and is treated as public."""
    declared_task_sizes: list[int] | None = None
    """The same for each of `tasks`, in their order: what `task_weights` need on private data."""
    declared_users: int | None = _number(None, least=1)
    """Public number of training users, stated by you: the plan's N with `privacy.unit=user_uls`."""
    validation_size: int | None = _number(400, least=1)
    """Number of validation records kept (null: all)."""
    test_size: int | None = _number(800, least=1)
    """Number of test records kept (null: all)."""
    tasks: list[str] | None = None
    """Keep these tasks only (null: all)."""
    task_weights: list[float] | None = None
    """Proportions among the training records of `tasks`, in their order: training records are left out until they hold
    on average, each by a hash of its content. Private data needs `declared_task_sizes`. Null: as they are."""
    template: str = _one_of("plain", "chat")
    """Prompt: one plain form for all backbones, or the chat template of the backbone's tokenizer."""
    on_long: str = _one_of("truncate", "error")
    """A record with more than `environment.sequence_length` tokens is cut by a public rule, or is a bad record."""
    on_bad: str = _one_of("error", "skip")
    """A record that is bad by itself stops the run with its file, line and field, or is left out and listed for the
    person at the terminal. What is listed is not private: it must not be published. What is wrong with several records
    together, or with the rest of a file, stops the run in any case."""


@dataclass
class PublicConfig:
    """What public data teach the adapter before anything private is touched (SPECIFICATION.md 1.9).

    The start that comes of it is made once, is kept in `compute.cache_dir` and is shared by all runs that ask for the
    same. `dptune public` makes it alone.
    """

    method: str = _one_of("none", "joint", "meta", "joint_meta", "basis")
    """`none`: the adapter starts fresh. `joint`: AdamW on all public records with their own answers. `meta`: Reptile
    (arXiv:1803.02999) over the sources, so that the adapter learns to learn. `joint_meta`: one, then the other.
    `basis`, for `adapter=lora_xs`: its frozen factors are the leading directions, on both sides of each matrix, of what
    another answer would change in public gradients."""
    data: dict[str, DataConfig] = field(default_factory=dict)
    """Public sources by a name of yours, each as `data` has it; training records are taken. On a command line:
    `+data@public.data.first=sst2 public.data.first.path=FILE`. Everybody may know them: nothing protects them. Empty:
    the organisations that the embedded backbones were pretrained on, one source each."""
    steps: int = _number(1500, least=1)
    """Joint training: number of steps."""
    batch_size: int = _number(64, least=1)
    """Public records in a step."""
    learning_rate: float = _number(0.01, above=0)
    """Joint training: learning rate at first, falling linearly to zero."""
    meta_steps: int = _number(150, least=1)
    """Reptile: number of outer steps. Each draws a source (of a single one, a task), trains on it for `inner_steps`,
    and moves towards where that ended."""
    meta_rate: float = _number(0.5, above=0, most=1)
    """Reptile: how far it moves at first, as a share of the way, falling linearly to zero."""
    inner_steps: int = _number(10, least=1)
    """Reptile: steps of a fresh Adam without momentum."""
    inner_learning_rate: float = _number(0.01, above=0)
    """Reptile: their learning rate."""
    relabel: float = _number(0.5, least=0, most=1)
    """Reptile: probability that the answers of an outer step's tasks with options are renamed, each to another public
    answer of the task, so that what they mean must be learned from the records."""
    seed: int = _number(0, least=0)
    """Public coins: initial weights, batches, renamings. The start does not depend on `environment.seed`."""


@dataclass
class HyperparameterConfig:
    """Settings of the optimisation."""

    learning_rate: float = _number(0.02, above=0)
    """Peak learning rate."""
    steps: int = _number(50, least=0)
    """Number of noisy steps; 0 evaluates the backbone as it is."""
    expected_batch_size: int = _number(256, least=1)
    """Expected size of a Poisson batch: sample rate times number of units; the public divisor of the sum."""
    max_grad_norm: float = _number(0.3, above=0)
    """Clipping bound on one unit's gradient."""
    rank: int = _number(4, least=1)
    """Rank of the adapter."""
    weight_decay: float = _number(0.0, least=0)
    """Decoupled weight decay (AdamW) or L2 (SGD)."""
    warmup_steps: int = _number(5, least=0)
    """Steps of linear warm-up of the learning rate."""
    decay: str = _one_of("linear", "constant")
    """Learning rate after the warm-up: linear to zero, or constant."""


@dataclass
class EnvironmentConfig:
    """Conditions of the computation that can change numbers."""

    seed: int = _number(0, least=0)
    """Seed of initialisation and, in reproducible noise mode, of batches and noise."""
    optimizer: str = _one_of("adamw", "adam", "sgd", "dp_adam_bc")
    """AdamW or Adam with their usual constants, SGD with momentum 0.9, or Adam without the bias of the noise."""
    adam_bc_floor: float = _number(0.1, above=0)
    """Smallest debiased second moment of `dp_adam_bc`, in units of the noise variance."""
    iterate_ema: float = _number(0.0, least=0, below=1)
    """Decay of the moving average of the weights that is kept; 0 keeps the last weights. Free post-processing."""
    shrinkage: str = _one_of("none", "james_stein", "singular_value")
    """Shrinkage of released gradients towards zero before the optimizer. Free post-processing."""
    precision: str = _one_of("float32", "bfloat16")
    """Number format of the frozen backbone. Adapters are float32, norms and sums of gradients float64 in any case."""
    backbone_quantization: str = _one_of("none", "int8", "nf4")
    """The weights of the frozen linear layers, except for the output head, are rounded once: to 8 bits with a scale for
    each output, or to 4-bit NormalFloat with a scale for each 64 weights (arXiv:2305.14314). Products with them are
    computed in `precision`. Saves memory, not time."""
    sequence_length: int = _number(96, least=8)
    """Most tokens of an example. A longer one loses the beginning of its prompt, by this public rule."""
    engine: str = _one_of("auto", "hooks", "functional", "opacus", "loop")
    """How per-example gradients are computed: our own hooks, torch.func layer by layer, Opacus, or one backward pass an
    example (`loop`); `auto` takes the fastest that is right for the adapter and the backbone. Whichever it is, it is
    compared with `loop` before training starts, and `auto` takes the next one when it is wrong."""


@dataclass
class EvaluationConfig:
    """How free-form answers are evaluated: generated greedily and compared with all references of their prompt."""

    prompts: int | None = _number(200, least=1)
    """Test prompts of each free-form task that are answered (null: all); records with other prompts are left out."""
    max_new_tokens: int = _number(64, least=1)
    """Most tokens that an answer may have."""


@dataclass
class DataSensitivityConfig:
    """Conditions of the data.

    `unseen_instructions` and what begins with `test_` change the test split only, all others the training split only.
    What happens to a record depends on it, on `data.seed` and on public names of tasks alone.
    """

    name: str = "clean"
    """Label of the condition."""
    train_fraction: float = _number(1.0, above=0, most=1)
    """Share of the training records that is kept, on average, by a hash of their content."""
    label_noise: float = _number(0.0, least=0, most=1)
    """Share of the training records with options whose answer is replaced by another option."""
    class_imbalance: float = _number(1.0, least=1)
    """Of records with options: how much more often the most frequent answer is kept than the rarest. The shares between
    fall exponentially (arXiv:1901.05555)."""
    task_imbalance: float = _number(1.0, least=1)
    """How much more often records of the most frequent task are kept than of the rarest, in the same way. Private data
    needs `data.tasks`, the names of the tasks in public."""
    user_tail: float = _number(0.0, least=0)
    """Exponent s of a long tail of users: a tenth of them keep all their records, the user at share u > 0.1 of a public
    random order keeps each with probability (0.1 / u)^s."""
    instruction_perturbation: float = _number(0.0, least=0, most=1)
    """Share of the training records whose instruction has a typo, other case, other order or a synonym."""
    duplicates: float = _number(0.0, least=0, most=1)
    """Share of the training records that occur twice. The guarantee is for a record with its copy, which costs more
    than for one row (SPECIFICATION.md 7.5)."""
    unseen_instructions: float = _number(0.0, least=0, most=1)
    """Share of the test records whose instruction has a wording that no training record has."""
    test_class_shift: float = _number(1.0, least=1)
    """As `class_imbalance`, of the test split, with the answers in reverse order."""
    test_distraction: float = _number(0.0, least=0, most=1)
    """Share of the test records whose input is made longer by sentences that say nothing."""


@dataclass
class TrackingConfig:
    """Mirrors of the record. The record on disk is the truth."""

    name: str = _one_of("none", "trackio", "wandb_offline", "wandb")
    """`trackio` keeps a database beside the runs, for a dashboard without an account; `wandb_offline` writes W&B files
    without network; `wandb` uploads when an account is configured."""
    project: str = "dptune"
    """Project of the mirror."""
    entity: str | None = None
    """W&B entity (null: the account's default)."""
    allow_private: bool = False
    """Also mirror telemetry of steps that no guarantee covers: what is marked NON_PRIVATE."""
    allow_times: bool = False
    """Private data: mirror while training goes on, with the time of each step, and total time and memory. Otherwise the
    mirror gets everything in one go at the end."""
    allow_test_metrics: bool = False
    """Private data: mirror and upload exact metrics of the test split, whose records no guarantee covers."""
    allow_adapters: bool = False
    """Private data: upload adapters without a guarantee, too: trained without privacy, or with known noise."""
    upload_adapters: bool = True
    """Upload the adapter of a finished run, where its data is public or its noise is secret."""


@dataclass
class ComputeConfig:
    """What cannot change numbers beyond rounding; not part of the run's identity."""

    device: str = "cpu"
    """A torch device."""
    threads: int = _number(1, least=1)
    """Threads of one run; one is best when several runs share the machine."""
    physical_batch_size: int = _number(24, least=1)
    """Examples of up to 64 tokens in one forward pass; longer ones come in fewer, so that the tokens stay about the
    same. The logical batch is cut into such pieces, of public shapes (SPECIFICATION.md 10.3)."""
    evaluation_batch_size: int = _number(64, least=1)
    """The same for the forward passes of the evaluation."""
    cache_dir: str = ".cache"
    """Folder of what is made once and shared by runs, such as a dequantised GGUF file."""
    output_root: str = "outputs"
    """Folder of the run folders."""
    checkpoint_every: int = _number(5, least=1)
    """Steps between two checkpoints, from which a killed run goes on; history and mirrors are as fresh as they are."""
    force: bool = False
    """Run again although a finished record exists, which stays until the new one is finished, too."""


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    public: PublicConfig = field(default_factory=PublicConfig)
    hyperparameter: HyperparameterConfig = field(default_factory=HyperparameterConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data_sensitivity: DataSensitivityConfig = field(default_factory=DataSensitivityConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    method: str | None = None
    """Name of the method in comparison tables; set by the files of `conf/method`."""
    sweep: str | None = None
    """Name of the sweep that asked for the run; set by the files of `sweeps`."""


def noise_mode(config: Config) -> NoiseMode:
    """The noise mode of a run with `auto` resolved: for data that is not published, noise is secret."""
    if config.privacy.noise_mode == "auto":
        return "reproducible" if is_published(config.data) else "secure"
    return "secure" if config.privacy.noise_mode == "secure" else "reproducible"


def public_sources(public: PublicConfig) -> dict[str, DataConfig]:
    """The sources that a start is made of, by their names; none without a start."""
    if public.method == "none":
        return {}
    sources = public.data or {name: DataConfig(organisation=name) for name in PRETRAINED_ON}
    return {name: replace(source, public=True) for name, source in sorted(sources.items())}


def is_public(data: DataConfig) -> bool:
    """Whether the records are said to be a public stand-in for private ones."""
    return data.name in EMBEDDED_DATA if data.public is None else data.public


def is_published(data: DataConfig) -> bool:
    """Whether the records are public where everybody can look: embedded here, or on the Hub.

    That a file is public is somebody's word, which is one key away from a mistake: it switches nothing off by itself.
    """
    return is_public(data) and data.path is None


def has_plain_hashes(data: DataConfig) -> bool:
    """Whether hashes of the records have no key."""
    return is_published(data) or (is_public(data) and data.plain_hashes)


def is_open(data: DataConfig) -> bool:
    """Whether record, tables and page may hold what tells about single records."""
    return is_published(data) or (is_public(data) and data.diagnostics)


def split_names(data: DataConfig) -> dict[str, str]:
    """From the source's names of splits to ours, or to `hash`; what is not named is left out."""
    pairs = (pair.rpartition(":") for pair in data.splits or [f"{split}:{split}" for split in SPLITS])
    return {source: ours for source, _, ours in pairs}
