"""Small random models with a real tokenizer, and job files over them."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["QUANTFLEET_BEAT_S"] = "0.2"  # a driver that was killed is soon known to be gone

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whomever

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs behind
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else commands here ignore it too

from tests.command import Outcome, quantfleet, snapshot

# Files whose tests start real Ray nodes: on several cores these have one of them to themselves,
# from the start, and each other file runs on one.
_WITH_NODES = {
    "test_cluster", "test_cluster_token", "test_deploy", "test_object_store", "test_plan_on_ray",
    "test_ray_hangs", "test_ray_parts", "test_resume", "test_s3_job", "test_telemetry",
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.partition("::")[0]).stem
            return "nodes" if name in _WITH_NODES else name

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=lambda item: item.path.stem not in _WITH_NODES)


VOCABULARY = 320
HIDDEN = 64
INNER = 128
BLOCKS = 3

TEXT = " ".join(
    f"Line {number}: the whale, the sea and the {number % 7} ships went on and on, said Ahab."
    for number in range(400)
)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    sliding = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llama": lambda: t.LlamaConfig(**_SHAPE),
        "llama-tied": lambda: t.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**_SHAPE),
        "qwen3": lambda: t.Qwen3Config(**_SHAPE, head_dim=16),
        "mistral": lambda: t.MistralConfig(**_SHAPE, sliding_window=16),
        "gemma2": lambda: t.Gemma2Config(
            **_SHAPE, head_dim=16, sliding_window=16, layer_types=sliding
        ),
        "olmo2": lambda: t.Olmo2Config(**_SHAPE),
        "cohere": lambda: t.CohereConfig(**_SHAPE),
        "stablelm": lambda: t.StableLmConfig(**_SHAPE),
        "mixtral": lambda: t.MixtralConfig(**_SHAPE, num_local_experts=4),
        "gpt2": lambda: t.GPT2Config(
            n_embd=HIDDEN,
            n_layer=2,
            n_head=4,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=1,
        ),
    }


ARCHITECTURES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2")


def save_model(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shape: Mapping[str, int] | None = None,
    **save: Any,
) -> Path:
    """A small random model of an architecture, saved as a Hugging Face folder with a tokenizer.

    `shape` changes what its config says of sizes.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    config = _configs()[name]()
    config.update(dict(shape or {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else 0.08 * noise
    model.to(dtype).save_pretrained(folder, **save)
    _tokenizer().save_pretrained(folder)
    return folder


def save_wide_model(folder: Path, inner: int) -> Path:
    """One block of a random llama, with a Hessian as wide as `inner`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(7)
    config = LlamaConfig(**{**_SHAPE, "num_hidden_layers": 1, "intermediate_size": inner})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT], vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN, or the largest whole number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The threads of small products wait for each other far longer than they work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("llama")`: made once a session; not to be changed by a test."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
        key = (name, dtype, *sorted(save.items()))
        if key not in made:
            made[key] = save_model(name, tmp_path_factory.mktemp(name), dtype, **save)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def job_file(
    tmp_path: Path, model_folder: Callable[..., Path], text_file: Path
) -> Callable[..., Path]:
    """Write a job file: `job_file(quantization={...})` replaces whole sections, None drops one."""

    def write(name: str = "job", **sections: Any) -> Path:
        job: dict[str, Any] = {
            "model": {"path": str(model_folder("llama"))},
            "quantization": {"scheme": "int4", "group_size": 32, "method": "gptq"},
            "compute_dtype": "float32",
            "calibration": {"text": str(text_file), "sequences": 8, "length": 32},
            "workers": {"count": 1},
            "output": {"store": str(tmp_path / "store")},
        }
        job.update(sections)
        job = {key: value for key, value in job.items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return write


@pytest.fixture
def job_to_plan(job_file: Callable[..., Path]) -> Callable[..., Path]:
    """A job to be planned: `job_to_plan(candidates=[...])` changes keys of its plan's section."""

    def write(name: str = "job", sections: dict[str, Any] | None = None, **plan: Any) -> Path:
        calls = (
            {}
            if plan.keys() & {"path", "profile"}
            else {"calls": [{"tokens": 1, "times": 8}, {"tokens": 16}]}
        )
        quantization = {"method": "plan", "plan": {**calls, **plan}}
        sections = sections or {}
        quantization |= sections.get("quantization", {})
        return job_file(name, **{**sections, "quantization": quantization})

    return write


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; its message, which is all that it leaves behind."""

    def run(
        code: int, *args: str | Path, command: Callable[..., Outcome] = quantfleet, lines: int = 1
    ) -> str:
        before = snapshot(tmp_path)
        outcome = command(*args)
        assert (outcome.code, outcome.out) == (code, ""), outcome
        assert len(outcome.err.splitlines()) == lines, outcome.err
        assert "Traceback" not in outcome.err
        assert snapshot(tmp_path) == before
        return outcome.err.strip()

    return run


@pytest.fixture(autouse=True)
def _logs_and_caches_apart(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_STATE_HOME", str(base / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "caches" / secrets.token_hex(8)))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 (and IAM) server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket as s3://NAME, and the environment that opens it."""
    for key, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    name = f"bucket-{secrets.token_hex(4)}"
    urlopen(Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture
def upload(bucket: str) -> Callable[..., str]:
    """`upload(folder)`: its URL in a new bucket."""
    from workers.store import open_store

    def put(folder: Path, name: str = "models/it") -> str:
        store = open_store(f"{bucket}/{name}")
        for file in folder.rglob("*"):
            if file.is_file():
                store.put_file(file.relative_to(folder).as_posix(), file)
        return store.url

    return put
