"""Every setting, in one frozen value; the only reader of the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import SettingsError
from .message import WhenBusy

__all__ = ["Settings"]

MIB = 1 << 20


def plan(name: str, default: Any, **limits: Any) -> Any:
    """Declare a field that is read from the plain variable `name`, as the bots' own guides call it."""
    return Field(default, validation_alias=AliasChoices(name.lower(), name), **limits)


class Settings(BaseSettings):
    """All settings with their defaults; arguments win over the environment, which is read once, here.

    Raises SettingsError that names the variable, the value found and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_prefix="WHISPER_FAST_", frozen=True, extra="forbid", populate_by_name=True, case_sensitive=False
    )

    # where
    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("whisper-fast")))
    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, le=65535)
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    trusted_api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()

    # the language model
    llm_chat_api_url: str | None = plan("LLM_CHAT_API_URL", None)
    llm_chat_model: str | None = plan("LLM_CHAT_MODEL", None)
    llm_chat_api_key: SecretStr | None = plan("LLM_CHAT_API_KEY", None)
    llm_request_timeout: float = plan("LLM_REQUEST_TIMEOUT", 90.0, gt=0)
    max_concurrent_requests: int = plan("MAX_CONCURRENT_REQUESTS", 50, ge=1)
    llm_concurrency: int | None = Field(None, ge=1)
    llm_queue_timeout: float = Field(90.0, gt=0)
    llm_fallback_urls: Annotated[tuple[str, ...], NoDecode] = ()
    llm_fallback_api_key: SecretStr | None = None
    llm_order: Literal["listed", "fastest", "prefix"] = "listed"
    llm_ca_file: Path | None = None
    llm_proxy: SecretStr | None = None
    llm_allow_link_local: bool = False
    context_tokens: int = Field(8192, ge=512)
    persona_file: Path | None = None

    # what reads the emotion: the lexicon, or the language model, within emotion_deadline, and the lexicon behind it
    emotion: Literal["vader", "llm"] = "vader"

    # what turns texts into vectors
    embedder: Literal["static", "minilm", "openai"] = "static"
    embedding_api_url: str | None = None
    embedding_model: str | None = None
    embedding_api_key: SecretStr | None = None
    embedding_dimension: int | None = Field(None, ge=1, le=65_536)
    embedding_timeout: float = Field(30.0, gt=0)

    # workers and batches
    thread_pool_size: int = plan("THREAD_POOL_SIZE", 8, ge=1, le=1024)
    process_pool_size: int = plan("PROCESS_POOL_SIZE", 4, ge=1, le=256)
    batch_size: int = plan("BATCH_SIZE", 32, ge=1, le=4096)
    batch_timeout_ms: float = plan("BATCH_TIMEOUT_MS", 100.0, ge=0)

    # limits
    max_text_bytes: int = Field(64 << 10, ge=1)
    max_waiting: int = Field(20_000, ge=1)
    max_waiting_bytes: int = Field(64 * MIB, ge=1024)
    max_wait_seconds: float = Field(4.0, gt=0)
    when_busy: WhenBusy = "queue"
    when_busy_by_channel: Annotated[dict[str, WhenBusy], NoDecode] = {}
    quarantine_after: int = Field(3, ge=0)
    component_deadline: float = Field(0.5, gt=0)
    emotion_deadline: float = Field(2.0, gt=0)
    drain_seconds: float = Field(30.0, gt=0)

    # how long the journal keeps what is finished, for messages that are delivered again
    journal_max_age_hours: float = Field(168.0, gt=0)
    journal_max_bytes: int = Field(512 * MIB, ge=0)

    # what is kept in memory, and how much the process may take in all: None is 75 % of the container, or 2 GiB
    memory_budget: int | None = Field(None, ge=64 * MIB)
    memory_cache_bytes: int = Field(256 * MIB, ge=MIB)
    ann_rows: int = Field(
        1_000_000, ge=1
    )  # memories of one user from which hnswlib proposes, see benches/bench_index.py
    conversation_cache_bytes: int = Field(64 * MIB, ge=MIB)
    conversation_cache_timeout_minutes: float = plan("CONVERSATION_CACHE_TIMEOUT_MINUTES", 15.0, gt=0)
    conversation_cache_bootstrap_limit: int = plan("CONVERSATION_CACHE_BOOTSTRAP_LIMIT", 20, ge=0)
    conversation_cache_max_local: int = plan("CONVERSATION_CACHE_MAX_LOCAL", 50, ge=1)

    # recent conversations that several engines share
    use_redis_cache: bool = plan("USE_REDIS_CACHE", False)
    redis_host: str = plan("REDIS_HOST", "localhost")
    redis_port: int = plan("REDIS_PORT", 6379, ge=1, le=65535)
    redis_password: SecretStr | None = plan("REDIS_PASSWORD", None)
    redis_namespace: str = Field("whisper-fast", min_length=1)

    # what is measured and what can be switched off
    performance_monitoring_enabled: bool = plan("PERFORMANCE_MONITORING_ENABLED", True)
    bottleneck_detection_enabled: bool = plan("BOTTLENECK_DETECTION_ENABLED", True)
    feature_parallel: bool = True
    feature_batching: bool = True
    feature_caching: bool = True
    feature_preload: bool = True
    feature_hedging: bool = True
    feature_adaptive: bool = True
    feature_ann: bool = True
    feature_budget: bool = True
    feature_threads: bool = True
    feature_processes: bool = True
    feature_linger: bool = True

    def __init__(self, **overrides: Any) -> None:
        """Read the environment; `overrides` win. Raises SettingsError."""
        try:
            super().__init__(**overrides)
        except ValidationError as error:
            raise SettingsError("; ".join(self._explain(e) for e in error.errors())) from None

    @field_validator("api_keys", "trusted_api_keys", "llm_fallback_urls", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(k.strip() for k in value.split(",") if k.strip()) if isinstance(value, str) else value

    @field_validator("when_busy_by_channel", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f'it is not JSON like {{"general": "merge"}} ({error})') from None

    @classmethod
    def _explain(cls, error: Any) -> str:
        field = str(error["loc"][0]) if error["loc"] else "settings"
        name = cls.variable(field.lower())
        found = "a secret" if "key" in field.lower() else repr(error["input"])
        return f"{name} is {found:.120}: {error['msg'][:1].lower()}{error['msg'][1:]}"

    @classmethod
    def variable(cls, field: str) -> str:
        """Return the environment variable that sets `field`."""
        info = cls.model_fields.get(field)
        if info is None:
            return field
        plain = info.validation_alias is not None
        return field.upper() if plain else f"WHISPER_FAST_{field.upper()}"
